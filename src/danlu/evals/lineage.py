"""Where a measured model came from: its artifacts back to the raw text, their ledgers, and its loss curves.

Everything is read from the artifacts themselves: a manifest names its parents by fingerprint, and the artifacts of one
recipe stand side by side in `<recipe>/<step>/<short fingerprint>/`.

    steps, ledger = trace([artifact.folder for artifact in models])
    curves = loss_curves("chat", folder)
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from danlu.core.artifact import is_artifact, read_manifest
from danlu.core.errors import DataError
from danlu.evals.figures import PER_ANSWER, PER_JUDGED, PER_PAIR, PER_TOKEN, Curve, LedgerLine, LineageStep

SHORT = 8  # characters of a fingerprint that name a folder
TRAINER_LOG = "trainer_log.jsonl"
# Keys of the log and what the curves are called. A policy's own loss says nothing, for its data change with it.
LOSSES = {"loss": "training", "eval_loss": "held out"}
REWARDS = {"rollout/reward": "reward", "eval_reward": "held out"}
OF_PAIRS = ("margin", "rewards/margins")  # keys that only the logs of trainings on comparisons have
ON_ANSWERS = ("rm", "dpo", "kto", "ppo")  # stages whose cutoff_len is that of a pair or of a prompt
MAX_FIGURES = 6  # of an artifact's metrics that are told


def trace(folders: Iterable[Path]) -> tuple[list[LineageStep], list[LedgerLine]]:
    """The artifacts in these folders and all their ancestors that can be found, parents first, and their ledgers."""
    steps: dict[str, LineageStep] = {}
    ledger: list[LedgerLine] = []
    for folder in folders:
        if is_artifact(folder):
            _visit(folder, steps, ledger)
    return list(steps.values()), ledger


def _visit(folder: Path, steps: dict[str, LineageStep], ledger: list[LedgerLine]) -> None:
    manifest = read_manifest(folder)
    fingerprint = manifest["fingerprint"]
    if fingerprint in steps:
        return
    parents: Mapping[str, str] = manifest["parents"]
    for parent in parents.values():
        found = _artifact_of(folder, parent)
        if found is not None:
            _visit(found, steps, ledger)
    step = folder.parent.name
    told = [f"{name} {parent[:SHORT]}" for name, parent in parents.items()]
    steps[fingerprint] = LineageStep(step, manifest["kind"], fingerprint, told, figures_in_words(manifest["metrics"]))
    ledger.extend(ledger_lines(step, folder))


def _artifact_of(folder: Path, fingerprint: str) -> Path | None:
    """The artifact of that fingerprint among those of the same recipe."""
    recipe = folder.parent.parent
    for place in sorted(recipe.glob(f"*/{fingerprint[:SHORT]}")) if fingerprint else []:
        if is_artifact(place) and read_manifest(place)["fingerprint"] == fingerprint:
            return place
    return None


def trained_context(folder: Path) -> int | None:
    """How many tokens at a time a model learned from: the least `cutoff_len` in its making; None where nothing tells.

    Beyond it a model reads positions that it never saw, whatever its config allows. Trainings on pairs and on answers do
    not count: theirs is the length of what is judged, which takes no position away that the model knew before.
    """
    if not is_artifact(folder):
        return None
    manifest = read_manifest(folder)
    parents = [_artifact_of(folder, parent) for parent in manifest["parents"].values()]
    found = [trained_context(parent) for parent in parents if parent is not None]
    if manifest["config"].get("stage") not in ON_ANSWERS:
        found.append(manifest["config"].get("settings", {}).get("cutoff_len"))
    return min((length for length in found if length is not None), default=None)


def figures_in_words(metrics: Mapping[str, Any]) -> str:
    """The first few numbers of an artifact's metrics: `num_tokens 1,234 · loss 2.345`."""
    told = []
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        told.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}")
    return " · ".join(told[:MAX_FIGURES])


def ledger_lines(step: str, folder: Path) -> list[LedgerLine]:
    """The stations of the artifact's ledger, if it keeps one."""
    path = folder / "ledger.json"
    if not path.is_file():
        return []
    return [LedgerLine(step, station["name"], station["in"], station["out"], _changes(station))
            for station in json.loads(path.read_bytes())["stations"]]


def _changes(station: Mapping[str, Any]) -> str:
    """What the station added and dropped, in its finest unit that is not 0."""
    told = []
    for sign, part in (("+", "added"), ("−", "dropped")):
        for reason, count in station[part].items():
            amounts = [f"{count[unit]:,} {unit}" for unit in ("rows", "tokens", "bytes") if count[unit]]
            told.append(f"{sign} {reason}: {', '.join(amounts) or '0'}")
    return "; ".join(told)


def loss_curves(model: str, folder: Path) -> list[Curve]:
    """The training loss and the held-out loss in the folder's trainer log, or the rewards of a policy's answers.

    Nothing where there is no log.
    """
    path = folder / TRAINER_LOG
    if not path.is_file():
        return []
    found: dict[str, tuple[list[int], list[float]]] = {key: ([], []) for key in (*LOSSES, *REWARDS)}
    of_pairs = False
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            of_pairs = of_pairs or any(key in row for key in OF_PAIRS)
            for key, (steps, values) in found.items():
                if row.get(key) is not None:
                    steps.append(int(row["step"]))
                    values.append(float(row[key]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"is no line of a trainer log: {error}", where=f"{path}:{number}") from None
    of_answers = bool(found["rollout/reward"][0])
    of_judged = is_artifact(folder) and read_manifest(folder)["config"].get("stage") == "kto"
    unit = PER_ANSWER if of_answers else PER_JUDGED if of_judged else PER_PAIR if of_pairs else PER_TOKEN
    return [Curve(model, label, *found[key], unit) for key, label in (REWARDS if of_answers else LOSSES).items()
            if found[key][0]]
