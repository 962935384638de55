"""Stage `pt`: pre-training from random weights, or continued pre-training of a model, on running text.

Rows of `source`, `target` and `category` may stand among the data: the source is read, the target is learned.

    base: {stage: pt, model: {model_type: llama, hidden_size: 256, …}, tokenizer: tokenizer, dataset: corpus}
    base: {stage: pt, objective: masked, model: {model_type: bert, …}, tokenizer: tokenizer, dataset: corpus}
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from danlu.core.config import FieldPath, free
from danlu.core.errors import ConfigError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.models.adapters import AdapterConfig
from danlu.pipeline.context import DOCSTRINGS, FILES, HUB, Context, Forecast, Input, Reference
from danlu.pipeline.denoising import (
    DenoiseConfig,
    check_objective,
    check_rows,
    check_target,
    document_encoder,
    name_mask,
    noise_of,
    save_form,
    shape_note,
)
from danlu.pipeline.examples import DataConfig, Prepared, Recipe, first, prepare, split_by_hash
from danlu.pipeline.mixing import MixedConfig, check_categories, check_mix, with_mix
from danlu.pipeline.models import adapter_of, check_adapters, model_config, model_references, place
from danlu.pipeline.sampling import SampleConfig, sampler_of
from danlu.pipeline.training import (
    MachineConfig,
    all_texts,
    check_evaluation,
    forecast_training,
    run_training,
)
from danlu.text.corpus import read_corpus
from danlu.text.read import SourceConfig, read_documents
from danlu.tokens.denoise import Masked
from danlu.train.trainer import TrainSettings

KIND = "model"
SCHEMA = 1
RESUMES = True
DISTRIBUTED = True
KEYS = ("dataset", "eval_dataset", "val_size", "cutoff_len", "max_samples", "category", "document", "text_field",
        "max_refused")


class Settings(DataConfig, TrainSettings, AdapterConfig, MachineConfig, MixedConfig, SampleConfig, DenoiseConfig):
    """The keys of a pre-training step."""

    model: str | dict[str, Any] = Field(description="a step, folder or hub id; or model_type and config keys")
    tokenizer: str | None = Field(None, description="a step, folder or hub id; default: the model's own")
    document: Literal["file", "paragraph", "line"] = Field("file", description="what one document of plain text is")
    text_field: FieldPath | None = Field(None, description="where a row's text is, in json, jsonl and csv")
    workers: int | None = free(None, ge=1, description="processes that tokenise much text; default: one a core")

    @model_validator(mode="after")
    def _model_is_possible(self) -> "Settings":
        if isinstance(self.model, dict) and self.tokenizer is None:
            raise ValueError("a model from nothing needs a tokenizer")
        check_mix(self)
        if isinstance(self.model, dict) and (self.finetuning_type != "full" or self.train_rows_from is not None):
            raise ValueError("a model from nothing has nothing to keep or to adapt: use finetuning_type: full alone")
        return self


def references(settings: Settings) -> list[Reference]:
    """The model, the tokenizer and the data."""
    found = [Reference(key, text, ("corpus", FILES, DOCSTRINGS)) for key, text in all_texts(settings)]
    if isinstance(settings.model, str):
        found += model_references(settings)
    if settings.tokenizer is not None:
        found.append(Reference(("tokenizer",), settings.tokenizer, ("tokenizer", "model", FILES, HUB)))
    return found


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """Every token but the first of each piece is learned, or what the objective chooses of them."""
    config = model_config(settings, inputs)
    found = with_mix(forecast_training(settings, inputs, config, share_learned=settings.share_learned(), task_tokens=0,
                                       mean_length=settings.cutoff_len / 2, shares_read=settings.shares_read()),
                     settings, inputs)
    return found if config is None or isinstance(settings.model, str) else replace(
        found, notes=[*found.notes, shape_note(config, settings.kind)])


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """The architecture's keys, the length against the model's positions, and settings that nothing would read."""
    from danlu.models.load import check_length, check_vocabulary, load_tokenizer

    corpora = [text for text in settings.datasets() if inputs[text].produces == "corpus"]
    outside = [text for _, text in all_texts(settings) if inputs[text].produces != "corpus"]
    unread = sorted(() if outside else {"document", "text_field", "max_refused", "category"} & settings.model_fields_set)
    if unread:
        raise ConfigError(f"“{unread[0]}” says how text outside a corpus is read, and this step reads corpora only",
                          key=unread[0], hint=f"Set it in the corpus step “{corpora[0]}”.")
    if corpora and settings.val_size:
        raise ConfigError(f"val_size would hold out a share beside the held-out documents of the corpus “{corpora[0]}”",
                          key="val_size", hint="Leave val_size out, or set heldout_share in the corpus step.")
    check_evaluation(settings, bool(corpora) or settings.eval_dataset is not None or settings.val_size > 0)
    check_adapters(settings, inputs)
    check_categories(settings, inputs)
    check_objective(settings, inputs)
    config = model_config(settings, inputs)
    if config is not None:
        check_length(config, settings.cutoff_len)
        check_target(config, settings)
    folder = inputs[settings.tokenizer].folder if settings.tokenizer is not None else None
    if config is not None and folder is not None and isinstance(settings.model, str):
        try:
            check_vocabulary(config, load_tokenizer(folder))
        except ConfigError as error:
            raise ConfigError(error.message, key="tokenizer", hint=error.hint) from None


def run(context: Context) -> dict[str, Any]:
    """Reads, encodes, trains and saves."""
    from danlu.models.load import Loaded, check_reopened, load_model, load_tokenizer, new_model, save_model

    settings, inputs = context.settings, context.inputs
    tokenizer = load_tokenizer(tokenizer_of(context))

    def load() -> Loaded:
        if isinstance(settings.model, dict):
            loaded = new_model(settings.model, tokenizer, adapters=settings, seed=context.seed, kind=settings.kind)
            check_reopened(loaded.lm.config, tokenizer)
        else:
            loaded = load_model(place(inputs[settings.model]), tokenizer=tokenizer, adapters=settings,
                                adapter=adapter_of(context), seed=context.seed, kind=settings.kind)
        return check_rows(loaded, settings.cutoff_len)

    def save(loaded: Loaded, folder: Path) -> None:
        save_model(loaded, folder, stop_ids)
        save_form(settings, folder)
        name_mask(settings, folder)

    measured: dict[str, float] = {}
    noise = noise_of(settings, tokenizer)
    prepared, stop_ids = prepare_examples(context, tokenizer)
    found = run_training(context, settings, prepared, load, save, noise=noise, trained=partial(_pseudo, noise, measured),
                         sampler=lambda world: sampler_of(context, tokenizer, world))
    return found | measured if found else found


def _pseudo(noise: Any, measured: dict[str, float], root: Any, prepared: Prepared, compute: Any) -> None:
    """Measures a trained masked model's pseudo-perplexity on what is held out."""
    from danlu.evals.pseudo import pseudo_perplexity

    if isinstance(noise, Masked) and prepared.held_out is not None:
        measured["pseudo_perplexity"] = pseudo_perplexity(
            root, prepared.held_out, noise.mask_id, device=compute.world.device,
            micro_batch_tokens=compute.micro_batch_tokens)


def tokenizer_of(context: Context) -> Path | str:
    """Where the step's tokenizer is."""
    return place(context.inputs[context.settings.tokenizer or context.settings.model])


def prepare_examples(context: Context, tokenizer: Any) -> tuple[Prepared, list[int]]:
    """The step's documents as Examples on disk, and the ids that end a text."""
    settings = context.settings
    encoder = document_encoder(settings, tokenizer)

    def read(ledger: Ledger, held_out_ledger: Ledger) -> tuple[Iterable[Document], Iterable[Document]]:
        def train(book: Ledger) -> Iterable[Document]:
            return chain.from_iterable(first(_documents(context, text, "train", book), settings.max_samples, book, text)
                                       for text in settings.datasets())

        corpora = [text for text in settings.datasets() if context.inputs[text].produces == "corpus"]
        named = settings.eval_datasets() or corpora
        if named:
            held_out = (_documents(context, text, "heldout", held_out_ledger) for text in named)
            return train(ledger), chain.from_iterable(held_out)
        return split_by_hash(train, settings.val_size, ledger)

    chosen = {name: getattr(settings, name) for name in KEYS} | settings.stored()
    return prepare(context, Recipe(chosen, tokenizer, read, encoder.documents, settings.kind != "causal")), \
        [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _documents(context: Context, text: str, split: Literal["train", "heldout"], ledger: Ledger) -> Iterable[Document]:
    item, settings = context.inputs[text], context.settings
    if item.produces == "corpus":
        return read_corpus(item.require_folder(), split)
    source = SourceConfig(path=text, document=settings.document, field=settings.text_field,
                          category=settings.category or "text", max_refused=settings.max_refused)
    return read_documents(source, context.base, ledger, pairs=settings.kind == "causal")
