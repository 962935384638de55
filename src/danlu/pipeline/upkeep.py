"""Looking after what runs have left: verify every byte, find what no recipe means, read the ledgers.

    for found in verify(Path("runs/quickstart")): print(found.folder, found.problem or "OK")
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.core.artifact import MANIFEST, is_artifact, open_artifact, read_manifest
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.recipe import CURRENT

SHORT_NAME = re.compile(r"((examples|reference)-)?[0-9a-f]{8}")  # a step's artifacts, and what they were trained on
WORK = ".work-"
REMOVING = ".removing-"


@dataclass(frozen=True, slots=True)
class Verified:
    """An artifact or checkpoint: fine where `problem` is empty."""

    folder: Path
    kind: str
    problem: str


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder that no recipe means."""

    folder: Path
    why: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LedgerOf:
    """One artifact's ledger and its quarantine: reason to (how many, the first places)."""

    name: str
    stations: dict[str, Any]
    quarantine: dict[str, tuple[int, list[str]]]


def require_run(folder: Path) -> None:
    """Raises ConfigError where there is no such folder."""
    if not folder.is_dir():
        known = sorted(path.name for path in Path("runs").iterdir() if path.is_dir()) if Path("runs").is_dir() else []
        raise ConfigError("there is no such folder", where=str(folder),
                          hint=f"Runs here: {', '.join(f'runs/{name}' for name in known)}." if known else None)


def verify(folder: Path) -> Iterator[Verified]:
    """Hashes every byte of every artifact and checkpoint below a folder, in the order of their names.

    A folder that is named like an artifact but has no manifest is damaged; unfinished work is `unfinished`'s matter.
    """
    require_run(folder)
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(REMOVING))
        here = Path(path)
        if MANIFEST in files:
            yield _verify(here)
        elif SHORT_NAME.fullmatch(here.name) and (here.parent / CURRENT).exists():
            yield Verified(here, "", f"{here}: has no {MANIFEST}")
        if CURRENT in files:
            named = here / (here / CURRENT).read_text(encoding="utf-8").strip()
            if not named.is_dir():
                yield Verified(named, "", f"{here / CURRENT}: names {named.name}, which is not there")


def _verify(folder: Path) -> Verified:
    kind = ""
    try:
        kind = read_manifest(folder)["kind"]
        open_artifact(folder, deep=True)
    except DataError as error:
        return Verified(folder, kind, f"{error.where}: {error.message}")
    return Verified(folder, kind, "")


def unfinished(folder: Path) -> list[Path]:
    """Work folders below, of runs that are under way or were stopped."""
    return sorted(path for path in folder.rglob(f"{WORK}*") if path.is_dir())


def leftovers(folder: Path) -> list[Leftover]:
    """Artifacts below a run (or a step's folder) that no `current` names, and what stopped runs left behind."""
    require_run(folder)
    found = []
    steps = [folder] if (folder / CURRENT).is_file() else sorted(path for path in folder.iterdir() if path.is_dir())
    for step in steps:
        meant = _meant(step)
        for path in sorted(path for path in step.iterdir() if path.is_dir()):
            if path.name.startswith(WORK):
                found.append(Leftover(path, "unfinished work; without it the step begins anew", _size(path)))
            elif path.name.startswith(REMOVING):
                found.append(Leftover(path, "was being removed", _size(path)))
            elif SHORT_NAME.fullmatch(path.name) and path.name not in meant and is_artifact(path):
                beside = path.name.startswith(("examples-", "reference-"))
                why = "no finished step was trained on this" if beside else "the recipe now means another"
                found.append(Leftover(path, why, _size(path)))
    return found


def _meant(step: Path) -> set[str]:
    """The names of what a step's `current` means: the artifact, and the examples that its metrics say it learned."""
    pointer = step / CURRENT
    if not pointer.is_file():
        return set()
    name = pointer.read_text(encoding="utf-8").strip()
    metrics = read_manifest(step / name)["metrics"] if (step / name / MANIFEST).is_file() else {}
    return {name, str(metrics.get("examples", "")), str(metrics.get("reference", ""))}


def run_of(folder: Path) -> Path:
    """The run's folder, whose lock is to be held, for a run or for one of its steps."""
    return folder.parent if (folder / CURRENT).is_file() else folder


def remove(leftover: Leftover) -> None:
    """Removes a leftover; renamed first, so that one that is half gone is never taken for an artifact."""
    folder = leftover.folder
    if not folder.name.startswith(REMOVING):
        folder = folder.rename(folder.with_name(REMOVING + folder.name.lstrip(".")))
    shutil.rmtree(folder)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def current_artifacts(folder: Path) -> list[Path]:
    """The folders that the `current` files of a run name, parents before children; an artifact's folder is itself.

    Raises ConfigError where there is none.
    """
    require_run(folder)
    if (folder / MANIFEST).is_file():
        return [folder]
    pointers = [folder / CURRENT] if (folder / CURRENT).is_file() else sorted(folder.glob(f"*/{CURRENT}"))
    found = [pointer.parent / pointer.read_text(encoding="utf-8").strip() for pointer in pointers]
    if not found:
        raise ConfigError("holds no artifact", where=str(folder), hint="Name a run, such as runs/quickstart.")
    manifests = {path: read_manifest(path) for path in found}
    parents = {manifest["fingerprint"]: list(manifest["parents"].values()) for manifest in manifests.values()}

    def depth(fingerprint: str) -> int:
        return 1 + max((depth(parent) for parent in parents[fingerprint] if parent in parents), default=0)

    return sorted(found, key=lambda path: (depth(manifests[path]["fingerprint"]), str(path)))


def read_ledger(artifact: Path) -> LedgerOf | None:
    """An artifact's ledger, or None where its stage keeps none. Raises DataError for a damaged one."""
    path = artifact / "ledger.json"
    if not path.is_file():
        return None
    try:
        ledger = json.loads(path.read_bytes())
        counts: Counter[str] = Counter()
        places: dict[str, list[str]] = {}
        quarantine = artifact / "quarantine.jsonl"
        if quarantine.is_file():
            for line in quarantine.read_text(encoding="utf-8").splitlines():
                item = json.loads(line)
                counts[item["reason"]] += 1
                if len(places.setdefault(item["reason"], [])) < 3:
                    places[item["reason"]].append(item["where"])
        for reason, cut in ledger.get("quarantine_cut", {}).items():  # of these some are kept, and all are counted
            counts[reason] += cut["rows"] - cut["kept"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"is damaged: {error}", where=str(path)) from None
    return LedgerOf(f"{artifact.parent.name}/{artifact.name}", ledger,
                    {reason: (count, places.get(reason, [])) for reason, count in counts.most_common()})
