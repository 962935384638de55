"""What a step's references stand for on this machine: concrete files, hashed, and the parents' fingerprints.

The content of everything outside the recipe is hashed once per process and path; `unchanged` asks again, cheaply, when
the step that reads it begins, so that a file edited while an earlier step ran cannot slip in under the old hash.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from danlu.core.artifact import digest, hash_files, open_artifact
from danlu.core.errors import ConfigError, DataError, nearest
from danlu.pipeline.context import DOCSTRINGS, FILES, HUB, TASK, Input, Reference
from danlu.pipeline.recipe import Meaning, Recipe, Step
from danlu.text.files import ALL_SUFFIXES, docstring_names, modules, suffix_of
from danlu.text.registry import resolve

MAX_NAMED_FILES = 500  # of one reference, whose hashes a manifest keeps so that a change can be named
Stamp = tuple[int, int]  # size and time of change of a file


@dataclass(slots=True)
class Contents:
    """Hashes of files outside the recipe, remembered while the process lives."""

    hashes: dict[Path, tuple[Stamp, str]] = field(default_factory=dict)

    def hash(self, paths: list[Path]) -> list[str]:
        """sha256 of each file; files that were hashed before and look the same are not read again."""
        new = [path for path in paths if path not in self.hashes or self.hashes[path][0] != _stamp(path)]
        stamps = [_stamp(path) for path in new]
        for path, stamp, sha in zip(new, stamps, hash_files(new), strict=True):
            self.hashes[path] = (stamp, sha)
        return [self.hashes[path][1] for path in paths]

    def unchanged(self, found: Input, meaning: Meaning, base: Path) -> None:
        """Raises DataError naming a file that is not the one that was hashed, or that has come or gone since."""
        hint = "Run the same command again; the changed file will be a changed input."
        for path in found.files:
            if path in self.hashes and (not path.exists() or _stamp(path) != self.hashes[path][0]):
                raise DataError("has changed since this run began", where=str(path), hint=hint)
        if found.files:
            moved = set(_files(found.text, meaning, base, found.text)) ^ set(found.files)
            if moved:
                raise DataError("has come or gone since this run began", where=str(min(moved)), hint=hint)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def outside_input(recipe: Recipe, step: Step, reference: Reference, contents: Contents) -> tuple[Input, dict[str, str]]:
    """The Input behind a reference that is no step, and the hash of each of its files by name.

    Raises ConfigError where nothing is behind it: an unknown package or task, an empty folder.
    """
    meaning = step.meanings[reference.text]
    where = recipe.source.place(("steps", step.name, *reference.key))
    if meaning.kind == HUB:
        return Input(reference.text, HUB, digest({"hub": reference.text})), {}
    if meaning.kind == TASK:
        return _task(reference.text, where, contents), {}
    if meaning.produces:
        return _artifact(reference.text, meaning), {}
    paths = _files(reference.text, meaning, recipe.base, where)
    folder = meaning.path if meaning.path is not None and meaning.path.is_dir() else None
    if folder is not None and reference.is_data and not any(suffix_of(path) in ALL_SUFFIXES for path in paths):
        raise ConfigError(f"“{reference.text}” holds no file that ends in {', '.join(ALL_SUFFIXES)}", where=where)
    named = _modules(reference.text) if meaning.kind == DOCSTRINGS else dict(zip(_names(paths), paths, strict=True))
    hashes = dict(zip(named, contents.hash(list(named.values())), strict=True))
    content: dict[str, object] = {"files": sorted(hashes.items())}
    if meaning.kind == DOCSTRINGS:
        names = [name.strip() for name in reference.text.partition(":")[2].split(",")]
        content["versions"] = [[name, _version(name)] for name in names]
    found = Input(reference.text, meaning.kind, digest(content), folder=folder, files=tuple(paths))
    return found, hashes if len(hashes) <= MAX_NAMED_FILES else {}


def _files(text: str, meaning: Meaning, base: Path, where: str) -> list[Path]:
    """The files behind a path, package or docstrings. Of a folder every file that is not hidden, whoever reads it."""
    path = meaning.path
    if path is not None and path.is_file():
        return [path]
    if path is not None:
        paths = [file for file in sorted(path.rglob("*"))
                 if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not paths:
            raise ConfigError(f"the folder “{text}” is empty", where=where)
        return paths
    try:
        return resolve(text, base)
    except ConfigError as error:
        raise ConfigError(error.message, where=error.where or where, hint=error.hint) from None


def _modules(text: str) -> dict[str, Path]:
    """Each module's file by its dotted name, wherever its package is installed."""
    return {module: path for name in docstring_names(text) for module, path in modules(name)}


def _artifact(text: str, meaning: Meaning) -> Input:
    assert meaning.path is not None, "artifacts are found as folders"
    artifact = open_artifact(meaning.path)
    # By content, not by its fingerprint: a folder from elsewhere may claim anything.
    content = digest({"kind": artifact.kind, "files": artifact.manifest["files"]})
    return Input(text, FILES, content, meaning.produces, meaning.path, artifact)


def _task(text: str, where: str, contents: Contents) -> Input:
    from danlu import tasks

    name = text.partition(":")[2]
    known = task_names()
    if name not in known:
        close = nearest(name, known)
        raise ConfigError(f"there is no task “{name}”", where=where,
                          hint=f"Did you mean task:{close}?" if close else f"Tasks: {', '.join(known)}.")
    sources = sorted(Path(tasks.__path__[0]).glob("*.py"))
    shas = dict(zip((path.name for path in sources), contents.hash(sources), strict=True))
    return Input(text, TASK, digest({"task": name, "sources": shas}))


def task_names() -> list[str]:
    """The tasks that `task:NAME` may name: each one, and `skills`, the mixture of all."""
    from danlu.tasks import TASKS

    return [*TASKS, *(["skills"] if "skills" not in TASKS else [])]


def _version(name: str) -> str:
    """The installed version of a package; for modules of the standard library, Python's own files decide alone."""
    found = importlib.metadata.packages_distributions().get(name.partition(".")[0], [])
    return importlib.metadata.version(found[0]) if found else ""


def _names(paths: list[Path]) -> list[str]:
    """Each file's name below the folder that holds them all, so that moving everything changes nothing."""
    if not paths:
        return []
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    return [path.relative_to(root).as_posix() for path in paths]
