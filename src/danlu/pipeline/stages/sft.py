"""Stage `sft`: supervised fine-tuning on dialogues, with the checkpoint's own chat template.

    chat: {stage: sft, model: base, dataset: [dialogues.jsonl, task:skills]}
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Literal

from pydantic import Field

from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue
from danlu.models.adapters import AdapterConfig
from danlu.pipeline.context import FILES, TASK, Context, Forecast, Input, Reference
from danlu.pipeline.examples import DataConfig, Prepared, Recipe, first, prepare, split_by_hash
from danlu.pipeline.models import adapter_of, check_adapters, model_config, model_references, tokenizer_of
from danlu.pipeline.training import (
    DEFAULT_TASK_PROMPTS,
    MachineConfig,
    all_texts,
    check_evaluation,
    check_files,
    forecast_training,
    run_training,
)
from danlu.tasks import task_dialogues
from danlu.text.formats import read_dialogues
from danlu.train.trainer import TrainSettings

KIND = "model"
SCHEMA = 1
RESUMES = True
DISTRIBUTED = True


class Settings(DataConfig, TrainSettings, AdapterConfig, MachineConfig):
    """The keys of a fine-tuning step."""

    model: str = Field(description="a step, folder or hub id")
    overlong: Literal["turns", "tokens", "split", "drop", "error"] = Field(
        "turns", description="what happens to a dialogue longer than cutoff_len")
    learn: Literal["assistant", "last", "all"] = Field(
        "assistant", description="which turns are learned: every answer, the last one, or everything")
    strict: bool = Field(False, description="stop at the first bad record instead of counting it")


def references(settings: Settings) -> list[Reference]:
    """The model and the data."""
    data = [Reference(key, text, (FILES, TASK)) for key, text in all_texts(settings)]
    return [*model_references(settings), *data]


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """About a third of a dialogue's tokens is learned, and short ones are short."""
    return forecast_training(settings, inputs, model_config(settings, inputs), share_learned=0.35, task_tokens=24,
                             mean_length=min(settings.cutoff_len, 200))


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """The length against the model's positions, and settings that nothing would read."""
    from danlu.models.load import check_length

    check_files(settings, inputs, "strict", "category")
    check_evaluation(settings, settings.eval_dataset is not None or settings.val_size > 0)
    check_adapters(settings, inputs)
    config = model_config(settings, inputs)
    if config is not None:
        check_length(config, settings.cutoff_len)


def run(context: Context) -> dict[str, Any]:
    """Reads, encodes, trains and saves."""
    from danlu.models.load import Loaded, load_model, load_tokenizer, save_model

    settings = context.settings
    source = tokenizer_of(context)
    tokenizer = load_tokenizer(source)
    prepared, stop_ids = prepare_examples(context, tokenizer)

    def load() -> Loaded:
        return load_model(source, tokenizer=tokenizer, adapters=settings, adapter=adapter_of(context),
                          seed=context.seed)

    return run_training(context, settings, prepared, load, lambda loaded, folder: save_model(loaded, folder, stop_ids))


def prepare_examples(context: Context, tokenizer: Any) -> tuple[Prepared, list[int]]:
    """The step's dialogues as Examples on disk, and the ids that end a turn."""
    from danlu.tokens.encode import Encoder

    settings = context.settings
    encoder = Encoder(tokenizer, settings.cutoff_len, settings.overlong, settings.learn)
    encoder.check()

    def read(ledger: Ledger, held_out_ledger: Ledger) -> tuple[Iterable[Dialogue], Iterable[Dialogue]]:
        train = chain.from_iterable(_dialogues(context, text, ledger, "train") for text in settings.datasets())
        if settings.eval_dataset is not None:
            return train, chain.from_iterable(_dialogues(context, text, held_out_ledger, "heldout")
                                              for text in settings.eval_datasets())
        return split_by_hash(train, settings.val_size, ledger)

    chosen = {name: getattr(settings, name) for name in ("dataset", "eval_dataset", "val_size", "cutoff_len",
                                                         "max_samples", "category", "overlong", "learn", "strict")}
    return prepare(context, Recipe(chosen, tokenizer, read, encoder.dialogues)), encoder.chat.stop_ids


def _dialogues(context: Context, text: str, ledger: Ledger, split: Literal["train", "heldout"]) -> Iterable[Dialogue]:
    settings = context.settings
    if context.inputs[text].kind == TASK:
        found = task_dialogues(text, context.seed, settings.max_samples or DEFAULT_TASK_PROMPTS, split)
        station = ledger.station(f"generate:{text}")
        size = sum(len(message.content.encode()) for dialogue in found for message in dialogue.messages)
        station.take(rows=len(found), bytes=size)
        station.give(rows=len(found), bytes=size)
        return found
    records = read_dialogues(text, context.base, ledger, category=settings.category or "chat", strict=settings.strict)
    return first(records, settings.max_samples, ledger, text)
