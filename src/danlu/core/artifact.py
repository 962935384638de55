"""Artifacts: folders that a stage leaves behind, whole or not at all.

A stage writes into a work folder; `publish` hashes every file, writes `manifest.json`, syncs everything to the disk and
renames the folder to its final name. A folder without a manifest that verifies is not an artifact. The rename is the
commit: a process killed at any moment leaves either the finished folder or none. Checkpoints are published the same way.

    publish(work, final, kind="model", fingerprint=..., parents={"corpus": "ab12…"}, config={...}, metrics={...})
    artifact = open_artifact(final, deep=True)      # deep: every byte is hashed again
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.core.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified folder. `manifest` holds kind, fingerprint, parents, config, code, files and metrics."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest["metrics"]


def canonical(value: object) -> bytes:
    """JSON bytes that are equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def digest(value: object) -> str:
    """sha256 of the canonical JSON of a value, as hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: list[Path]) -> list[str]:
    """sha256 of each file, in parallel (hashlib releases the interpreter lock)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_file, paths))


def files_below(folder: Path) -> list[Path]:
    """Every regular file below a folder, in a fixed order; links are refused because they could point anywhere."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise DataError("is a link; danlu's own folders hold plain files only", where=str(path))
        if path.is_file():
            found.append(path)
    return found


def sync(path: Path) -> None:
    """Asks the system to put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems have no fsync on folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces a file in one step: written beside it, synced, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk into one clear message; whatever was half-written stays under a temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"the disk is full ({error.strerror}); nothing half-written was published",
                            where=str(folder), hint="Free some space and run the same command again.") from error
        raise


def publish(work: Path, final: Path, *, kind: str, fingerprint: str, parents: Mapping[str, str],
            config: Mapping[str, Any], metrics: Mapping[str, Any], code: str) -> Artifact:
    """Finishes the work folder with a manifest and renames it to `final`, which must not exist."""
    with disk_errors(work):
        for path in (work / MANIFEST, *work.glob(f".{MANIFEST}.*.tmp")):  # of a publication that was interrupted
            path.unlink(missing_ok=True)
        paths = files_below(work)
        for path in paths:
            sync(path)
        files = {path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": sha}
                 for path, sha in zip(paths, hash_files(paths), strict=True)}
        manifest = {"format": FORMAT, "kind": kind, "fingerprint": fingerprint, "parents": dict(parents),
                    "config": dict(config), "code": code, "files": files, "metrics": dict(metrics)}
        manifest["sha256"] = digest(manifest)
        write_atomic(work / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
        inside = {folder for path in paths for folder in path.parents if work == folder or work in folder.parents}
        for folder in sorted({work, *inside}, reverse=True):  # the innermost first
            sync(folder)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, final)
        sync(final.parent)
    return Artifact(final, manifest)


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds a manifest of danlu's; other programs have files of that name too.

    Raises DataError for one that cannot be read, because it may be a damaged one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"is damaged: {error}", where=str(path),
                        hint="If it is not danlu's, keep it out of the folder that danlu reads.") from None
    return isinstance(found, dict) and {"format", "kind", "fingerprint", "files"} <= set(found)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("has no manifest.json: it is not a finished artifact", where=str(folder)) from None
    except ValueError as error:
        raise DataError(f"is damaged: {error}", where=str(path), hint=_REMAKE) from None
    claimed = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    if claimed is None or claimed != digest(manifest):
        raise DataError("is damaged: its content does not match its own hash", where=str(path), hint=_REMAKE)
    if manifest["format"] != FORMAT:
        raise DataError(f"has format {manifest['format']}; this danlu reads format {FORMAT}", where=str(path))
    return {**manifest, "sha256": claimed}


_REMAKE = "Remove that folder and run the recipe again to make it anew."


def open_artifact(folder: Path, *, kind: str | None = None, deep: bool = False) -> Artifact:
    """Verifies an artifact and opens it. Sizes and the list of files always; with `deep` every byte.

    Raises DataError naming the file that is missing, foreign, of another size or (deep) of another content.
    """
    manifest = read_manifest(folder)
    if kind is not None and manifest["kind"] != kind:
        raise DataError(f"is a {manifest['kind']} artifact, not a {kind} artifact", where=str(folder))
    listed: Mapping[str, Any] = manifest["files"]
    present = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    present.pop(MANIFEST, None)
    for name, entry in listed.items():
        path = present.get(name)
        if path is None:
            raise DataError("is missing, though the manifest lists it", where=str(folder / name), hint=_REMAKE)
        if path.stat().st_size != entry["size"]:
            raise DataError(f"has {path.stat().st_size} bytes; the manifest says {entry['size']}",
                            where=str(path), hint=_REMAKE)
    foreign = sorted(set(present) - set(listed))
    if foreign:
        raise DataError("is not in the manifest: artifacts are never edited", where=str(folder / foreign[0]))
    if deep:
        verify_hashes(folder, listed)
    return Artifact(folder, manifest)


def verify_hashes(folder: Path, listed: Mapping[str, Any]) -> None:
    """Hashes every listed file again. Raises DataError naming the first one whose bytes have changed."""
    names = sorted(listed)
    for name, sha in zip(names, hash_files([folder / name for name in names]), strict=True):
        if sha != listed[name]["sha256"]:
            raise DataError("is damaged: its bytes do not match the hash in the manifest",
                            where=str(folder / name), hint=_REMAKE)


def fresh_folder(path: Path) -> Path:
    """An empty folder at that place; what an interrupted run left there is removed."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path
