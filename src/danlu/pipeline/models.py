"""The models that a step names: where they are, what adapters go with them, and their configs before they exist."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.core.errors import ConfigError
from danlu.pipeline.context import FILES, HUB, Context, Input, Reference


def model_references(settings: Any) -> list[Reference]:
    """The model that is trained, and the adapters that it goes on from."""
    found = [Reference(("model",), settings.model, ("model", FILES, HUB))]
    if settings.adapter_name_or_path is not None:
        found.append(Reference(("adapter_name_or_path",), settings.adapter_name_or_path, ("model", "reward_model", FILES)))
    return found


def place(item: Input) -> Path | str:
    """The folder behind a reference to a model or tokenizer, or its hub id."""
    return item.text if item.kind == HUB else item.require_folder()


def adapter_of(context: Context) -> Path | None:
    """The folder of the adapters that a step goes on from; None where it begins with fresh ones.

    Raises ConfigError where the step or folder that is named holds none.
    """
    text = context.settings.adapter_name_or_path
    if text is None:
        return None
    folder = context.inputs[text].require_folder()
    for found in (folder / "adapter", folder):
        if (found / "adapter_config.json").is_file():
            return found
    raise ConfigError(f"“{text}” holds no adapters", where=str(folder),
                      hint="Name a step with finetuning_type: lora, or a folder with adapter_config.json.")


def identities(context: Context, *keys: str) -> list[str]:
    """The fingerprints of what those settings name; "" where a setting is empty."""
    texts = [getattr(context.settings, key) for key in keys]
    return ["" if text is None else context.inputs[text].fingerprint for text in texts]


def require_same_vocabulary(tokenizer: Any, other: Path | str, key: str) -> None:
    """Raises ConfigError where a model that is asked about a policy's answers was trained with another tokenizer."""
    from danlu.models.load import load_tokenizer
    from danlu.tokens.codec import vocabulary_of

    if vocabulary_of(load_tokenizer(other)) != vocabulary_of(tokenizer):
        raise ConfigError(f"the model of “{key}” reads other tokens than the policy writes", where=str(other), key=key,
                          hint="Name a model that comes from the same base, so that both have one tokenizer.")


def model_config(settings: Any, inputs: Mapping[str, Input]) -> Any:
    """The config of the model that a step trains; None while it is not known (its step or tokenizer has not run)."""
    from danlu.models.load import load_config, load_tokenizer, new_config

    if isinstance(settings.model, dict):
        item = inputs[settings.tokenizer]
        if item.folder is not None:
            return new_config(settings.model, load_tokenizer(item.folder))
        size = item.forecast.facts.get("vocab_size") if item.forecast else None
        return None if size is None else new_config(settings.model, None, int(size))
    item = inputs[settings.model]
    if item.folder is not None:
        return load_config(item.folder)
    return item.forecast.facts.get("config") if item.forecast else None
