"""Strict settings: an unknown key, a wrong type or an impossible value is one clear message with its place.

Each class of settings stands beside the code that uses it and derives from `Config`. A field declared with `free()`
does not change the result (how often to save, how large a micro-batch is) and stays out of the fingerprint, however
deep it stands.

    class ScheduleConfig(Config):
        warmup_ratio: float = Field(0.0, ge=0, le=1, description="…")
        logging_steps: int = free(10, ge=1, description="…")
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from danlu.core.errors import ConfigError, nearest

# What users of other trainers write, and what it is called here.
HINTS = {
    "per_device_train_batch_size": "global_batch_size (the batch is stated once, for all devices together)",
    "gradient_accumulation_steps": "global_batch_size (accumulation is derived from it)",
    "batch_size": "global_batch_size",
    "micro_batch_size": "micro_batch_tokens",
    "model_name_or_path": "model",
    "base_model": "model",
    "max_length": "cutoff_len",
    "block_size": "cutoff_len",
    "sequence_len": "cutoff_len",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "output_dir": "--runs on the command line",
    "bf16": "precision: bf16",
    "fp16": "precision: bf16",
    "packing": "nothing: danlu always packs, and documents never see each other",
    "neat_packing": "nothing: danlu always packs, and documents never see each other",
    "lora_r": "lora_rank",
    "adapter": "finetuning_type",
    "mask_history": "learn: last",
    "strict": "max_refused: 0",
    "mix_strategy": "mix, with shares, epochs or a temperature",
    "interleave_probs": "mix: {shares: {…}}, which are of learned tokens",
    "interleave_prob": "mix: {shares: {…}}, which are of learned tokens",
    "num_buckets": "mix: {buckets: …}",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "loss_type": "pref_loss",
    "label_smoothing": "dpo_label_smoothing",
    "pref_bco_weight": "pref_loss: [sigmoid, bco] with loss_weights",
}


_FIELD_PATH = re.compile(r"[^.\[\]]+(\[\])?(\.[^.\[\]]+(\[\])?)*")


def _is_field_path(value: str) -> str:
    if not _FIELD_PATH.fullmatch(value):
        raise ValueError("a path of names joined by dots, with [] after the name of a list, such as data[].text")
    return value


FieldPath = Annotated[str, AfterValidator(_is_field_path)]  # where in a row something is: content, data[].text


class Config(BaseModel):
    """The parent of all settings: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the result, as plain JSON values: what a fingerprint is made of."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("changes_result") is False:
                values.pop(name)
            else:
                values[name] = _result_part(getattr(self, name), values[name])
        return values


def _result_part(value: Any, plain: Any) -> Any:
    """What changes the result in a value, given with its plain JSON form: configs in it leave out what is free."""
    if isinstance(value, Config):
        return value.result_settings()
    if isinstance(value, list | tuple):
        return [_result_part(*pair) for pair in zip(value, plain, strict=True)]
    if isinstance(value, Mapping):
        return {key: _result_part(item, plain[key]) for key, item in zip(plain, value.values(), strict=True)}
    return plain


def free(default: Any, **kwargs: Any) -> Any:
    """A field that cannot change the result, only how it is reached; it is left out of the fingerprint."""
    return Field(default, json_schema_extra={"changes_result": False}, **kwargs)


C = TypeVar("C", bound=Config)
Place = Callable[[tuple[str | int, ...]], str]


def read_config(cls: type[C], values: Mapping[str, Any], place: Place) -> C:
    """Validates plain values into a `cls`. `place(path)` tells where a key stands, as `file:line`.

    Raises ConfigError with every problem found, each with its place, the value, what is allowed and the nearest key.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = _by_path(values, error.errors(include_url=False))
        raise ConfigError("\n".join(_explain(cls, path, item, place) for path, item in problems)) from None


def _by_path(values: Mapping[str, Any], items: Iterable[Any]) -> list[tuple[tuple[str | int, ...], Any]]:
    """The problems with their real paths, those of one value's alternatives (`int | str`) made one.

    Where an alternative has a problem deeper inside the value, it was the one that was meant: the others go.
    """
    found: dict[tuple[tuple[str | int, ...], str], Any] = {}
    for item in items:
        path = _real_path(values, item)
        own_kind = item["type"] in ("missing", "extra_forbidden")
        key = (path, item["type"] if own_kind else "")
        if key not in found:
            found[key] = dict(item)
        elif not own_kind and item["msg"] not in found[key]["msg"]:
            found[key]["msg"] += f" or {item['msg'].removeprefix('Input should be ')}"
    paths = [path for path, _ in found]
    return [(path, item) for (path, _), item in found.items()
            if not any(len(other) > len(path) and other[:len(path)] == path for other in paths if path)]


def _real_path(values: Mapping[str, Any], item: Any) -> tuple[str | int, ...]:
    """A problem's path through the values; pydantic's also names the types that it tried."""
    path: list[str | int] = []
    current: Any = values
    for part in item["loc"]:
        there = current if isinstance(current, Mapping) else \
            range(len(current)) if isinstance(current, list | tuple) else ()
        if part in there:
            path.append(part)
            current = current[part]
    if item["type"] == "missing":
        path.append(item["loc"][-1])
    return tuple(path)


def _explain(cls: type[Config], path: tuple[str | int, ...], item: Any, place: Place) -> str:
    key = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        name = str(path[-1])
        known = known_keys(cls, path[:-1])
        close = nearest(name, known)
        said = HINTS.get(name) or close
        advice = f"Did you mean {said}?" if said else f"Known keys: {', '.join(sorted(known))}."
        return f"{place(path)}: unknown key “{key}”. {advice}"
    if item["type"] == "missing":
        return f"{place(path[:-1])}: the key “{key}” is missing."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not path:  # about several keys together
        return f"{place(path)}: {message}."
    return f"{place(path)}: “{key}” is {item['input']!r}: {message[0].lower()}{message[1:]}."


def known_keys(cls: type[Config], path: tuple[str | int, ...]) -> set[str]:
    """The keys allowed at a path inside a config class (following nested config classes)."""
    current: Any = cls
    for part in path:
        if isinstance(part, int):
            continue
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            continue  # pydantic names the chosen union member in the path too
        current = _nested(fields[part].annotation)
    fields = getattr(current, "model_fields", {})
    return set(fields) | {field.alias for field in fields.values() if field.alias}


def _nested(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _nested(inner)
        if found is not None:
            return found
    return None
