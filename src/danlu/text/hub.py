"""Datasets in the layout of the hub: which files of a repository, or of a folder like one, are which subset and split.

Subsets and splits are what the front matter of `README.md` says under `configs`; without it a subset is a folder of that
name, and a split is told by the word train, validation or test in a file's path, as the hub itself does. A script in the
repository is never run. From the hub the files come through its own client and stay in its cache, so that a dataset that
was fetched once is read without a network; of a subset, and of a split that the README names, nothing else is fetched.

    parts_of(Path("mix"), "mix", "zh", None, (".parquet",))     mix/zh/train-00000-of-00002.parquet, …
    snapshot("owner/name", "zh", None)                          ~/.cache/huggingface/hub/datasets--owner--name/…
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from danlu.core.errors import ConfigError, nearest
from danlu.text.files import ALL_SUFFIXES, COMPRESSED, ROW_SUFFIXES, Located, suffix_of

README = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The split that a word in a file's path stands for.
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_SHARD = re.compile(r"(?:^|/)([\w.]+?)-\d{5}-of-\d{5}\.")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Subset:
    """One subset: the name that the README gives it, and its splits' patterns, by name; of no split under ""."""

    name: str
    patterns: Mapping[str, Sequence[str]]
    default: bool = False


def is_hub_id(name: str, roots: Iterable[Path]) -> bool:
    """owner/name, where `owner` is not simply a local folder in which `name` is missing, nor `name` one of a data file."""
    owner = name.partition("/")[0]
    return bool(HUB_ID.fullmatch(name)) and suffix_of(Path(name)) not in ALL_SUFFIXES and \
        not any((root / owner).is_dir() for root in roots)


def snapshot(name: str, subset: str | None, split: str | None, below: str = "") -> Path:
    """The folder of a dataset on the hub with at least the files of that subset and split, fetched or from the cache.

    Raises ConfigError where neither has it, or its README names no such subset.
    """
    known = _configs(_download(name, [README]))
    patterns: Iterable[str] = ["**" if subset in (None, "default") else f"{subset}/**"]
    if below:
        patterns = [f"{below.strip('/')}/**"]
    elif known:
        own = _named_subset(known, name, subset).patterns
        patterns = own[split or ""] if split in own else [pattern for several in own.values() for pattern in several]
    return _download(name, [found for pattern in patterns for found in _for_the_client(pattern)])


def _for_the_client(pattern: str) -> list[str]:
    """Patterns of the hub's client that match all data files that a pattern means; there * stands for any folders, too."""
    loose = re.sub(r"\*\*/?", "*", pattern.removeprefix("./")).replace("[", "[[]")
    if not loose.endswith("*"):
        return [loose]
    return [f"{loose}{suffix}{packed}" for suffix in ROW_SUFFIXES for packed in ("", *COMPRESSED)]


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"the dataset “{name}” is neither here nor on the hub: {reason}",
                          hint="A local dataset is named by its file or folder, or by its entry in dataset_info.json."
                          ) from None


def parts_of(folder: Path, label: str, subset: str | None, split: str | None, suffixes: tuple[str, ...], below: str = ""
             ) -> list[Located]:
    """The files of one subset and split; `below`: only those in that folder of it.

    Without a subset the default one is meant, without a split `train`, or the only one that there is. Raises ConfigError
    where the choice is not clear, or nothing is left.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.is_file() and suffix_of(path) in suffixes and path.name != README
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    names = [name for name in names if not below or name.startswith(below.strip("/") + "/")]
    splits = _splits(names, _subset(folder, label, subset, names))
    chosen = split or ("train" if "train" in splits else next(iter(splits), None) if len(splits) == 1 else None)
    if chosen not in splits:
        close = nearest(split or "", splits)
        raise ConfigError(f"“{label}” has no split “{split or 'train'}”" + (f" in the subset “{subset}”" if subset else ""),
                          hint=f"Did you mean {close}?" if close else f"Its splits: {', '.join(splits) or 'none'}.")
    return [Located(folder / name, f"{label.rstrip('/')}/{name}") for name in splits[str(chosen)]]


def _subset(folder: Path, label: str, subset: str | None, names: list[str]) -> Subset:
    """The subset that is meant. Raises ConfigError where it is not there, or several are and none is named."""
    known = _configs(folder)
    if not known:
        tops = sorted({PurePosixPath(name).parts[0] for name in names if "/" in name})
        if subset is None:
            return Subset("", {"": ["**"]})
        if subset not in tops and subset != "default":
            raise ConfigError(f"“{label}” has no subset “{subset}”",
                              hint=f"Folders with data files: {', '.join(tops) or 'none'}.")
        return Subset(subset, {"": ["**" if subset == "default" and subset not in tops else f"{subset}/**"]})
    return _named_subset(known, label, subset)


def _named_subset(known: Mapping[str, Subset], label: str, subset: str | None) -> Subset:
    """The one that is meant of those that a README names."""
    if subset is not None:
        if subset not in known:
            raise ConfigError(f"“{label}” has no subset “{subset}”", hint=f"Its subsets: {', '.join(known)}.")
        return known[subset]
    default = [item for item in known.values() if item.default or item.name == "default"]
    if len(known) == 1 or default:
        return (default or list(known.values()))[0]
    raise ConfigError(f"“{label}” has several subsets",
                      hint=f"Name one, as in {label}[{next(iter(known))}]; there are {', '.join(known)}.")


def _splits(names: list[str], subset: Subset) -> dict[str, list[str]]:
    """Split to its files. Files of no split are told apart by their names; where none tells, all are `train`."""
    found: dict[str, list[str]] = {}
    for split, patterns in subset.patterns.items():
        matched = [name for name in names if any(_matches(name, pattern) for pattern in patterns)]
        if split:
            found[split] = matched
            continue
        told = {name: _split_of(name) for name in matched}
        for name, own in told.items():
            if own or not any(told.values()):
                found.setdefault(own or "train", []).append(name)
    return {split: files for split, files in found.items() if files}


def _split_of(name: str) -> str:
    """The split that a path tells; "" where it tells none."""
    shard = _SHARD.search(name)
    if shard:
        return SPLITS.get(shard[1].lower(), shard[1])
    words = [word for part in reversed(PurePosixPath(name).parts) for word in _WORD.findall(part.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def _matches(name: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern, in which * stands for anything but /, and ** for any folders."""
    parts = [{"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
             for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))]
    return re.fullmatch("".join(parts), name) is not None


def _configs(folder: Path) -> dict[str, Subset]:
    """The subsets that the README names. Raises ConfigError where its front matter cannot be read."""
    try:
        text = (folder / README).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(folder / README)) from None
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        matter = YAML(typ="safe", pure=True).load(parts[1])
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"its front matter is no YAML: {error}", where=str(folder / README)) from None
    configs = matter.get("configs") if isinstance(matter, dict) else None
    found = [_config(config) for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    return {item.name: item for item in found}


def _config(config: dict[str, Any]) -> Subset:
    """One entry of `configs`: its files as a pattern, a list of patterns, or a list of splits with theirs."""
    files, inside = config.get("data_files"), str(config.get("data_dir") or "").strip("/")
    patterns: dict[str, list[str]] = {}
    for item in files if isinstance(files, list) else [files]:
        split, path = (str(item.get("split", "")), item.get("path")) if isinstance(item, dict) else ("", item)
        for pattern in path if isinstance(path, list) else [path]:
            if isinstance(pattern, str):
                patterns.setdefault(split, []).append(f"{inside}/{pattern}" if inside else pattern)
    return Subset(str(config.get("config_name", "default")), patterns or {"": [f"{inside}/**" if inside else "**"]},
                  config.get("default") is True)
