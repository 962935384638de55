"""What a step trains on, shown token by token: the very Examples, micro-batches and weights that the trainer gets.

    danlu inspect recipes/quickstart.yaml chat --number 2 --model runs/quickstart/chat
"""

import importlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.core.errors import ConfigError, DanluError, DataError
from danlu.core.examples import Branch, Example, Noise
from danlu.pipeline.context import STEP, Context, Input, SingleProcess
from danlu.pipeline.denoising import DenoiseConfig, noise_of
from danlu.pipeline.examples import Prepared
from danlu.pipeline.lock import hold
from danlu.pipeline.mixing import MixedConfig, account_of, loader_of, mix_of, show_account
from danlu.pipeline.plan import Plan, PlannedStep, plan
from danlu.pipeline.recipe import CURRENT, Recipe, read_local
from danlu.pipeline.stages import STAGES
from danlu.pipeline.tables import plain

if TYPE_CHECKING:
    from rich.console import Console


class NotReady(ConfigError):
    """A step reads another one that has not run."""


def inspect_step(recipe: Recipe, name: str, console: "Console", *, runs: str | Path = "runs", number: int = 3,
                 at: int = 0, model: str | None = None) -> None:
    """Prints the micro-batches of optimizer step `at` and its first `number` examples; where answers are sampled, the
    prompts of rollout `at`.

    Prepares the examples if they are not there yet. Raises ConfigError for a step that trains nothing, and for one whose
    inputs have not been made.
    """
    from rich.text import Text

    from danlu.models.load import load_tokenizer
    from danlu.tokens.show import show_example

    context, module = step_context(recipe, name, console, runs)
    context.work.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(module.tokenizer_of(context))
    prepared = _prepared(context, module, tokenizer, Path(runs) / recipe.name)
    loader, total = _loader(prepared, context)
    if at >= total:
        unit = context.settings.unit.split()[-1]
        raise ConfigError(f"the training has {total} {unit}s; there is no {unit} {at}", hint="--at counts from 0.")
    batch = _drawn(loader, context, _noise(context, tokenizer, model)).batch(at)
    _show_mix(console, context, loader, total)
    _show_batch(console, context, prepared, batch, at)
    scorer = None if model is None else _Scorer(_folder(model, recipe, runs), tokenizer)
    for example in batch.examples[:number]:
        console.rule(Text(f"{example.category} · {example.id}"))
        console.print(show_example(example, tokenizer, None if scorer is None else scorer.bits(example),
                                   prepared.artifact.manifest["config"].get("classes", ())))
    _show_ledger(console, prepared)


def trains(stage: str) -> bool:
    """Whether a stage makes examples of rows."""
    return hasattr(importlib.import_module(STAGES[stage]), "prepare_examples")


def step_context(recipe: Recipe, name: str, console: "Console", runs: str | Path, stale: bool = False
                 ) -> tuple[Context, Any]:
    """What a training step would run in, and its stage's module.

    stale  take a step's last artifact where the one that the recipe now means has not been made, and say so

    Raises ConfigError for a step that trains nothing, NotReady for one whose inputs have not been made.
    """
    step = recipe.step(name)
    if not trains(step.stage):
        raise ConfigError(f"step “{name}” ({step.stage}) trains nothing", hint="inspect shows what "
                          f"{', '.join(filter(trains, STAGES))} steps train on; `danlu ledger` shows the rest.")
    module: Any = importlib.import_module(STAGES[step.stage])
    planned = plan(recipe, runs).steps[name]
    inputs = dict(planned.inputs)
    for text, item in planned.inputs.items():
        if item.kind == STEP and item.folder is None and item.produces != "reward_model":  # that comes later
            last = Path(runs) / recipe.name / text
            if stale and (last / CURRENT).is_file():
                inputs[text] = replace(item, folder=read_local(last).path)
                console.print(plain(f"“{text}” would run again; the last one is read: {inputs[text].folder}", "yellow"))
                continue
            raise NotReady(f"step “{text}” has not run yet, and “{name}” reads it",
                           hint=f"danlu run RECIPE --only {text}")
    return _context(recipe, planned, inputs, SingleProcess(), console), module


def _context(recipe: Recipe, planned: PlannedStep, inputs: Mapping[str, Input], world: SingleProcess,
             console: "Console") -> Context:
    step = planned.step
    return Context(step=step.name, settings=step.settings, seed=recipe.seed, inputs=inputs, work=planned.work,
                   fingerprint=planned.fingerprint, base=recipe.base, world=world, console=console)


def accounts_beforehand(found: Plan, console: "Console") -> dict[str, dict[str, Any]]:
    """By step that is to run what its mix will take to the last token (`danlu.data.shares`), where its examples are there.

    Nothing is written, and no lock is needed: what is there is whole.
    """
    accounts: dict[str, dict[str, Any]] = {}
    for name, planned in found.steps.items():
        made = all(item.kind != STEP or item.folder is not None for item in planned.inputs.values())
        examples = any(planned.work.parent.glob("examples-*"))
        if planned.artifact is not None or mix_of(planned.step.settings) is None or not made or not examples:
            continue
        if (account := _account(found.recipe, planned, console)) is not None:
            accounts[name] = account
    return accounts


def _account(recipe: Recipe, planned: PlannedStep, console: "Console") -> dict[str, Any] | None:
    from danlu.models.load import load_tokenizer

    module: Any = planned.step.module
    context = _context(recipe, planned, planned.inputs, SingleProcess(is_main=False), console)
    try:
        prepared = module.prepare_examples(context, load_tokenizer(module.tokenizer_of(context)))[0]
    except DanluError:  # the examples are others; what may be wrong with an input, the run says
        return None
    loader, total = _loader(prepared, context)
    return account_of(loader, context.settings, total)


def _prepared(context: Context, module: Any, tokenizer: Any, run: Path) -> Prepared:
    """The step's examples. Missing ones are made under the run's lock; while a run holds it, they must be there."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(run))
        except ConfigError as held:
            try:
                return module.prepare_examples(replace(context, world=SingleProcess(is_main=False)), tokenizer)[0]
            except DataError:
                raise held from None
        return module.prepare_examples(context, tokenizer)[0]


def _noise(context: Context, tokenizer: Any, model: str | None) -> Noise | None:
    """What the step does to its examples where they are drawn, where it does anything."""
    settings = context.settings
    if not isinstance(settings, DenoiseConfig):
        return None
    if model is not None and settings.kind != "causal":
        raise ConfigError("prices of tokens are those of causal models", hint="Leave --model out.")
    return noise_of(settings, tokenizer)


def _drawn(loader: Any, context: Context, noise: Noise | None) -> Any:
    from danlu.data.noisy import Noisy

    return loader if noise is None else Noisy(loader, noise, context.seed)


def _loader(prepared: Prepared, context: Context) -> tuple[Any, int]:
    """The step's loader, and how often the training asks it."""
    settings = context.settings
    loader = loader_of(prepared.train, settings, context.seed)
    if settings.max_steps is None:
        return loader, loader.num_steps(settings.num_train_epochs)
    return loader, -(-settings.max_steps // settings.stride)


def _show_mix(console: "Console", context: Context, loader: Any, total: int) -> None:
    """What of each category the training takes, where its stage may mix."""
    if not isinstance(context.settings, MixedConfig):
        return
    account = account_of(loader, context.settings, total)
    if context.settings.mix is not None or len(account["groups"]) > 1:
        show_account(console, f"what {total:,} steps take", account, sources=True)


def _show_batch(console: "Console", context: Context, prepared: Prepared, batch: Any, at: int) -> None:
    from rich.table import Table

    from danlu.data.pack import micro_batches
    from danlu.tokens.feedback import num_learned
    from danlu.train.parallel import device_kind
    from danlu.train.trainer import DEFAULT_MICRO_BATCH_TOKENS

    store = prepared.train
    learned = _learned(prepared)
    console.print(f"{prepared.artifact.folder}: {len(store):,} examples, {store.num_tokens:,} tokens, "
                  f"{learned:,} of them learned"
                  + (f", {store.num_targets - learned:,} only read" if learned < store.num_targets else "")
                  + ("" if prepared.held_out is None else f"; {len(prepared.held_out):,} examples held out"))
    unit = context.settings.unit
    what = "prompts to be answered" if unit == "rollout" else "examples, each attending to itself alone"
    table = Table(title=f"{unit} {at}: {len(batch.examples)} {what}")
    for title in ("micro-batch", "examples", "tokens", "learned", "lengths"):
        table.add_column(title, justify="left" if title == "lengths" else "right")
    device = context.settings.device
    kind = device_kind(None if device == "auto" else device)
    tokens = context.settings.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[kind]
    for row, group in enumerate(micro_batches(batch.examples, tokens)):
        lengths = [str(example.num_tokens) for example in group]
        shown = " ".join(lengths[:12]) + (f" … ({len(lengths) - 12} more)" if len(lengths) > 12 else "")
        table.add_row(str(row), str(len(group)), f"{sum(e.num_tokens for e in group):,}",
                      f"{sum(map(num_learned, group)):,}", shown)
    console.print(table)


def _learned(prepared: Prepared) -> int:
    """How many of the training tokens are learned; those that are asked about and only read are counted by the ledger."""
    from danlu.pipeline.upkeep import read_ledger
    from danlu.tokens.feedback import STATION

    kept = read_ledger(prepared.artifact.folder)
    stations = [] if kept is None else kept.stations["stations"]
    return next((station["in"]["tokens"] for station in stations if station["name"] == STATION), prepared.train.num_targets)


def _show_ledger(console: "Console", prepared: Prepared) -> None:
    from danlu.pipeline.tables import ledger_table
    from danlu.pipeline.upkeep import read_ledger

    kept = read_ledger(prepared.artifact.folder)
    if kept is not None:
        console.print(ledger_table("how the examples came about", kept.stations))


def _folder(model: str, recipe: Recipe, runs: str | Path) -> Path:
    """The folder of a model that is named by a step of the recipe or by a path."""
    folder = Path(runs) / recipe.name / model if model in {step.name for step in recipe.steps.values()} else Path(model)
    current = folder / CURRENT
    return folder / current.read_text(encoding="utf-8").strip() if current.is_file() else folder


class _Scorer:
    """−log₂ p of every token by one model."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        from danlu.models.load import check_vocabulary, load_model

        self.root = load_model(folder).root.eval()
        check_vocabulary(self.root.lm.config, tokenizer)  # a step may have added tokens since

    def bits(self, example: Example) -> list[np.ndarray]:
        """One array for each branch; nan where nothing predicts the token."""
        import torch

        whole = Example(example.stem, tuple(Branch(branch.tokens) for branch in example.branches))
        with torch.no_grad():
            batch = self.root.batch([whole]).to(self.root.lm.device)
            found = (-self.root(batch).logprobs_S / math.log(2)).float().cpu().numpy()
        branch_of = batch.site_branch_S.cpu().numpy()
        rows = []
        for number, branch in enumerate(example.branches):
            own = found[branch_of == number]
            rows.append(np.concatenate([np.full(len(branch.tokens) - len(own), np.nan, np.float32), own]))
        return rows
