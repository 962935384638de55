"""What steps that mix their data share: the setting, the loader, and what is told of the mix before, during and after.

    base: {stage: pt, …, mix: {shares: {zh: 0.7, en: 0.3}, buckets: 10}, max_steps: 600}

The plan says about how much of each category will be learned, and exactly once the examples are there, as `danlu inspect`
and the run before its first step do; the log tells shares and passes so far (`share/zh`, `epochs/zh`); the artifact keeps
the account in `mix.json`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import Field

from danlu.core.artifact import write_atomic
from danlu.core.config import Config
from danlu.core.errors import ConfigError, nearest
from danlu.data.mix import MixConfig, asked_of, passes_of
from danlu.pipeline.context import Context, Forecast, Input
from danlu.pipeline.mix_tables import account_table, loss_table, mix_tables
from danlu.pipeline.tables import plain

if TYPE_CHECKING:
    from rich.console import Console

    from danlu.data.loader import Loader
    from danlu.data.mixed import Mixed
    from danlu.data.store import ExampleStore

MIX = "mix.json"


class MixedConfig(Config):
    """How the data are mixed; without it every example comes once an epoch, in an order drawn over all."""

    mix: MixConfig | None = Field(None, description="shares, epochs, temperature, buckets or phases of the data")


def check_mix(settings: Any) -> None:
    """Raises ValueError where the mix and the step's length do not go together."""
    if settings.mix is not None:
        settings.mix.check_length(settings.max_steps, "num_train_epochs" in settings.model_fields_set)


def loader_of(store: "ExampleStore", settings: Any, seed: int) -> "Loader | Mixed":
    """The step's examples in the order that its settings say."""
    from danlu.data.loader import Loader
    from danlu.data.mixed import mixed

    mix = mix_of(settings)
    if mix is None:
        return Loader(store, seed=seed, **settings.batch_size())
    return mixed(mix, store, seed=seed, max_steps=settings.max_steps, sizes=settings.batch_size())


def mix_of(settings: Any) -> MixConfig | None:
    """The mix of a step, where its stage mixes and it is asked for."""
    return settings.mix if isinstance(settings, MixedConfig) else None


def account_of(loader: "Loader | Mixed", settings: Any, num_steps: int) -> dict[str, Any]:
    """What the first so many steps take, as `danlu.data.shares` counts it."""
    from danlu.data.shares import share_account

    return share_account(loader, mix_of(settings), num_steps)


def tell_mix(context: Context, store: "ExampleStore") -> None:
    """Prints what the run will take, before its first step. Raises DataError where that is more than `max_epochs`."""
    from danlu.data.shares import require_epochs

    settings = context.settings
    mix = mix_of(settings)
    if mix is None:
        return
    loader = loader_of(store, settings, context.seed)
    account = account_of(loader, settings, settings.max_steps or loader.num_steps(settings.num_train_epochs))
    show_account(context.console, f"the mix of {account['steps']:,} steps, as it will be", account)
    for sentence in require_epochs(account, mix.max_epochs):
        context.console.print(plain(sentence, "yellow"))


def show_account(console: "Console", title: str, account: Mapping[str, Any], sources: bool = False) -> None:
    """Prints what some steps take, and where there are phases what each takes."""
    for table in mix_tables(title, account, sources):
        console.print(table)


def keep_mix(context: Context, loader: "Loader | Mixed", num_steps: int, log: Sequence[Mapping[str, Any]],
             best_step: int | None) -> dict[str, Any]:
    """Writes `mix.json` of the steps that were trained, prints it beside the losses, and gives what the manifest says.

    best_step  the step whose weights are kept, where that is not the last
    """
    from danlu.data.shares import share_account

    if not isinstance(context.settings, MixedConfig):
        return {}
    account = account_of(loader, context.settings, num_steps)
    if context.settings.mix is None and len(account["groups"]) == 1:
        return {}
    by_category = account
    if account["by"] != "category":  # losses are of categories, of which nothing was asked
        by_category = share_account(loader, None, num_steps)
        by_category["groups"] = [row | {"asked": None} for row in by_category["groups"]]
    losses = category_losses(log, [row["name"] for row in by_category["groups"]], best_step)
    write_atomic(context.work / MIX, json.dumps(account, ensure_ascii=False, indent=1) + "\n")
    if by_category is not account:
        context.console.print(account_table(f"what {num_steps:,} steps have taken", account))
    context.console.print(loss_table(f"what {num_steps:,} steps have learned", by_category, losses))
    return {"categories": {row["name"]: {name: row[name] for name in ("asked", "realised", "epochs", "unseen_tokens")} |
                           losses.get(row["name"], {}) for row in by_category["groups"]}}


def category_losses(log: Sequence[Mapping[str, Any]], names: Sequence[str], best_step: int | None
                    ) -> dict[str, dict[str, float]]:
    """Of each category the last training loss, and the held-out loss before training and of the kept weights."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        evals = [(line["step"], line[f"eval_loss/{name}"]) for line in log if line.get(f"eval_loss/{name}") is not None]
        trained = [line[f"loss/{name}"] for line in log if line.get(f"loss/{name}") is not None]
        own = {"loss": trained[-1]} if trained else {}
        if evals:
            kept = next((value for step, value in evals if step == best_step), evals[-1][1])
            own |= {"eval_loss_before": evals[0][1], "eval_loss": kept}
        if own:
            found[name] = own
    return found


def with_mix(forecast: Forecast, settings: Any, inputs: Mapping[str, Input], share_learned: float = 1.0) -> Forecast:
    """A forecast with what is known of the mix before anything was tokenised: `facts["mix"]`, for `planned_tables`."""
    mix = mix_of(settings)
    if mix is None:
        return forecast
    sizes = _sizes(settings, inputs) if mix.by == "category" else {}
    if not set(mix.names()) <= set(sizes):  # something is named that has not been counted
        sizes = {}
    if sizes and settings.max_steps is None:
        factor = sum(passes * sizes[name] for name, passes in passes_of(mix, sizes).items()) / sum(sizes.values())
        forecast = forecast.times(tokens=factor, steps=factor, flops=factor, seconds=factor)
    tables = asked_of(mix, sizes) if sizes else [dict(table.shares or {}) for table in mix.tables]
    parts = [1.0] if not mix.phases else [(end - start) / settings.max_steps
                                          for start, end in pairwise(mix.phase_ends(settings.max_steps))]
    rows = []
    for name in sizes or mix.names():
        share = sum(table.get(name, 0.0) * part for table, part in zip(tables, parts, strict=True))
        tokens = share * share_learned * forecast.tokens.value if forecast.tokens is not None and all(tables) else None
        rows.append({"name": name, "asked": [table.get(name, 0.0) if table else None for table in tables],
                     "tokens": tokens, "epochs": None if tokens is None or not sizes else tokens / sizes[name]})
    phases = [mix.phase_name(number) for number in range(len(mix.tables))]
    told = {"by": mix.by, "rows": rows, "phases": phases, "buckets": mix.buckets}
    return replace(forecast, facts={**forecast.facts, "mix": told})


def check_categories(settings: Any, inputs: Mapping[str, Input]) -> None:
    """Raises ConfigError where the mix names other categories than the data hold, as far as that is known."""
    mix = mix_of(settings)
    known = _sizes(settings, inputs)
    if mix is None or mix.by != "category" or not mix.names() or not known:
        return
    for name in mix.names():
        if name not in known:
            close = nearest(name, known)
            raise ConfigError(f"no document is of the category “{name}”", key="mix", hint=(
                f"Did you mean “{close}”? " if close else "") + f"The data hold: {', '.join(sorted(known))}.")
    for name in known:
        if name not in mix.names() and not mix.takes_all:
            raise ConfigError(f"the data hold the category “{name}”, which the mix does not name", key="mix",
                              hint=f"Give it a share; “{name}: 0” leaves it out.")


def _sizes(settings: Any, inputs: Mapping[str, Input]) -> dict[str, float]:
    """About how many tokens of each category there are, where all data are corpora that have been made; else nothing."""
    from danlu.pipeline.training import ASSUMED_BYTES_PER_TOKEN

    sizes: dict[str, float] = {}
    for text in settings.datasets():
        artifact = inputs[text].artifact
        if inputs[text].produces != "corpus" or artifact is None:
            return {}
        for name, splits in artifact.metrics["categories"].items():
            if splits["train"]["bytes"]:
                sizes[name] = sizes.get(name, 0.0) + splits["train"]["bytes"] / ASSUMED_BYTES_PER_TOKEN
    return sizes
