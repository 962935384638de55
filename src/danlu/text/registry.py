"""What the name of a dataset stands for: files, a part of them, and what their columns are called.

    data.jsonl   data/   data/*.jsonl.gz   package:NAME/path     files, as `danlu.text.files` finds them
    data#1000                                                    the first 1,000 records
    folder[subset]   folder[subset:split]                        a dataset in the layout of the hub (`danlu.text.hub`)
    owner/name   owner/name[subset]                              such a dataset on the hub
    name   folder/name                                           an entry of dataset_info.json, in LLaMA-Factory's form

`dataset_info.json` lies in the folder that is named, or, for a name alone, in the current folder, the recipe's, or the
folder `data` of one of them. What is there under the very name comes first, then the registry, then the hub.
"""

import json
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from danlu.core.errors import ConfigError, nearest
from danlu.text import files
from danlu.text.fields import Row
from danlu.text.files import ALL_SUFFIXES, DOCSTRINGS, PACKAGE, Located, locate, suffix_of
from danlu.text.hub import is_hub_id, parts_of, snapshot
from danlu.text.lines import Gate

INFO = "dataset_info.json"
FOLDERS = ("", "data")  # where a registry is looked for when only a name is given
FORMATTINGS = ("alpaca", "sharegpt")
# The columns of an entry, and what the rows are to call them.
COLUMNS = {"prompt": "prompt", "query": "query", "response": "response", "history": "history", "messages": "messages",
           "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
MEDIA = ("images", "videos", "audios")  # columns that danlu cannot read
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
        "system_tag": "system"}
KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting", "ranking",
        "subset", "split", "folder", "num_samples", "columns", "tags"}
TURN_COLUMNS = ("messages", "chosen", "rejected")
T = TypeVar("T")
_COUNT = re.compile(r"(.+)#(\d+)")
_PART = re.compile(r"(.+)\[([^\[\]:]*)(?::([^\[\]:]+))?\]")


@dataclass(frozen=True, slots=True)
class Found:
    """What was found under a name.

    files     in their order, with labels
    count     how many records are asked for; None: all
    columns   the name that rows are read by → the name in the file; None: the file's names are the ones
    tags      the keys and roles of turns: role_tag, content_tag, user_tag, …
    registry  the dataset_info.json that names it
    """

    files: tuple[Located, ...]
    count: int | None = None
    columns: Mapping[str, str] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    registry: Path | None = None

    def row(self, values: dict[str, Any]) -> Row:
        """The row under the names that it is read by."""
        if self.columns is None:
            return Row(values if not self.tags else {name: self._turns(value) for name, value in values.items()})
        names = {name: column for name, column in self.columns.items() if column in values}
        given = {name: values[column] for name, column in names.items()}
        given |= {name: self._turns(given[name]) for name in TURN_COLUMNS if name in given}
        others = [column for column, value in values.items() if column not in names.values() and value not in (
            None, "", [], {})]
        return Row(given, names, others)

    def _turns(self, value: Any) -> Any:
        """Turns with the keys and roles that danlu knows; what is no turn stays as it is."""
        if isinstance(value, list):
            return [self._turns(turn) for turn in value]
        role_key, content_key = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        if not isinstance(value, dict) or role_key not in value:
            return value
        roles = {self.tags[tag]: role for tag, role in TAGS.items() if tag in self.tags}
        rest = {key: part for key, part in value.items() if key not in (role_key, content_key)}
        role = value[role_key]
        return {"role": roles.get(role, role) if isinstance(role, str) else role,
                "content": value.get(content_key), **rest}


def find(path: str, base: Path, suffixes: tuple[str, ...] = ALL_SUFFIXES) -> Found:
    """The files behind a name, and how their rows are read. Raises ConfigError where nothing is there.

    Relative paths are tried against the current directory, then against `base`. From folders only files with these
    suffixes are taken.
    """
    try:
        return Found(tuple(locate(path, base, suffixes)))
    except ConfigError as error:
        missing = error
    if path.startswith(DOCSTRINGS):
        raise missing
    name, count = path, None
    if numbered := _COUNT.fullmatch(path):
        name, count = numbered[1], int(numbered[2])
        if count == 0:
            raise ConfigError(f"“{path}” asks for no records", hint="Write the number that is wanted behind the #.")
    if name.startswith(PACKAGE):
        return Found(tuple(locate(name, base, suffixes)), count)
    subset = split = None
    if not _is_there(name, base, suffixes) and (part := _PART.fullmatch(name)):
        name, subset, split = part[1], part[2] or None, part[3]
    found = _named(name, base, suffixes, subset, split, missing)
    return replace(found, count=found.count if count is None else count)


def counted(records: Generator[T, None, None], found: Found, gate: Gate) -> Iterator[T]:
    """As many records as are asked for; what lies behind them is not read, and what was read of it is dropped."""
    given = 0
    for record in records:
        given += 1
        yield record
        if given == found.count:
            break
    records.close()  # which has every reader below it balance what it took and did not give
    if found.count is not None:
        gate.station.note("the first records, as many as asked for" if given == found.count else
                          f"fewer records than the {found.count} asked for", rows=given)


def resolve(path: str, base: Path) -> list[Path]:
    """The concrete files behind a name, sorted, with the registry that says how they are read. ConfigError if none."""
    if path.startswith(DOCSTRINGS):
        return files.resolve(path, base)
    found = find(path, base)
    return sorted({*(located.path for located in found.files), *([found.registry] if found.registry else [])})


def is_dataset(path: str, base: Path) -> bool:
    """Whether a name stands for data, as far as can be told without fetching or opening them."""
    name = numbered[1] if (numbered := _COUNT.fullmatch(path)) else path
    part = _PART.fullmatch(name)
    roots = [Path.cwd(), base]
    return any(_is_there(text, base, ALL_SUFFIXES) or _entry(text, roots)[1] is not None or is_hub_id(text, roots)
               for text in ([name, part[1]] if part else [name]))


def _is_there(path: str, base: Path, suffixes: tuple[str, ...]) -> bool:
    try:
        return bool(locate(path, base, suffixes))
    except ConfigError:
        return False


def _named(name: str, base: Path, suffixes: tuple[str, ...], subset: str | None, split: str | None,
           missing: ConfigError) -> Found:
    """What a name without a count and a part stands for."""
    roots = [Path.cwd(), base]
    places = [root / Path(name).expanduser() for root in roots]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is not None and (subset or split):
        return Found(tuple(parts_of(folder, name, subset, split, suffixes)))
    if _is_there(name, base, suffixes):
        if subset or split:
            raise ConfigError(f"“{name}” is no folder, so it has no part [{subset or ''}{':' + split if split else ''}]")
        return Found(tuple(locate(name, base, suffixes)))
    info, entry = _entry(name, roots)
    if entry is not None and info is not None:
        return _registered(info, PurePosixPath(name).name, entry, suffixes, subset, split)
    if is_hub_id(name, roots):
        return Found(tuple(parts_of(snapshot(name, subset, split or "train"), name, subset, split or "train", suffixes)))
    hint = name_hint(name, base)
    raise ConfigError(missing.message, where=missing.where, hint=f"{missing.hint} {hint}") if hint else missing


def name_hint(path: str, base: Path) -> str:
    """What the registry that would have a name says of one that it does not have; "" where there is no registry."""
    name = numbered[1] if (numbered := _COUNT.fullmatch(path)) else path
    name = part[1] if (part := _PART.fullmatch(name)) else name
    info = None if suffix_of(Path(name)) in ALL_SUFFIXES else _entry(name, [Path.cwd(), base])[0]
    if info is None:
        return ""
    close = nearest(PurePosixPath(name).name, _read(info))
    return f"In {info} there is no “{PurePosixPath(name).name}”" + (f"; did you mean {close}?" if close else ".")


def _entry(name: str, roots: list[Path]) -> tuple[Path | None, Mapping[str, Any] | None]:
    """(the registry, its entry of that name); the first registry where none has it."""
    place = PurePosixPath(name)
    folders = FOLDERS if len(place.parts) == 1 else (str(place.parent),)
    first: Path | None = None
    for root in roots:
        for folder in folders:
            info = root / Path(folder).expanduser() / INFO
            if info.is_file():
                first = first or info
                entries = _read(info)
                if place.name in entries:
                    return info, entries[place.name]
    return first, None


def _read(info: Path) -> dict[str, Any]:
    """The registry. Raises ConfigError where it cannot be read as one."""
    try:
        value = json.loads(info.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(info)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", where=str(info)) from error
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise ConfigError(f"is no JSON: {error}", where=f"{info}:{line}") from error
    if not isinstance(value, dict):
        raise ConfigError("is no registry: it has to be an object of names and entries", where=str(info))
    return value


def _registered(info: Path, name: str, entry: Any, suffixes: tuple[str, ...], subset: str | None, split: str | None
                ) -> Found:
    """The dataset of one entry."""
    where = f"{info}: {name}"
    _check(entry, where)
    subset, split = subset or entry.get("subset"), split or entry.get("split")
    if entry.get("hf_hub_url"):
        label, below = str(entry["hf_hub_url"]), str(entry.get("folder") or "")
        parts = parts_of(snapshot(label, subset, split or "train", below), label, subset, split or "train", suffixes, below)
    elif not entry.get("file_name"):
        kind = next((key for key in ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name") if entry.get(key)), None)
        why = {"script_url": "is made by a script, and code that comes with data is never run",
               "cloud_file_name": "lies in a cloud storage that danlu does not read"}
        reason = why.get(kind, "lies on a hub that danlu does not read") if kind else "has no file_name"
        raise ConfigError(f"the dataset {reason}", where=where, hint="Download it and give the entry a file_name.")
    else:
        target = info.parent / str(entry["file_name"])
        if target.is_dir() and (subset or split):
            parts = parts_of(target, str(target), subset, split, suffixes)
        else:
            parts = [_relabelled(file, info.parent) for file in locate(str(target), info.parent, suffixes)]
    columns = entry.get("columns")
    known = None if columns is None else {COLUMNS[key]: column for key, column in columns.items()
                                          if key in COLUMNS and column is not None}
    return Found(tuple(parts), entry.get("num_samples"), known, dict(entry.get("tags") or {}), info)


def _relabelled(file: Located, folder: Path) -> Located:
    """The file under the name that the registry has for it, so that records are the same wherever the folder lies."""
    inside = file.path.is_relative_to(folder)
    return Located(file.path, file.path.relative_to(folder).as_posix()) if inside else file


def _check(entry: Any, where: str) -> None:
    """Raises ConfigError for an entry that cannot be meant."""
    if not isinstance(entry, dict):
        raise ConfigError("is no object", where=where)
    strange = sorted(set(entry) - KEYS)
    if strange:
        close = nearest(strange[0], KEYS)
        raise ConfigError(f"unknown key “{strange[0]}”", where=where,
                          hint=f"Did you mean {close}?" if close else f"Known are {', '.join(sorted(KEYS))}.")
    if entry.get("formatting", "alpaca") not in FORMATTINGS:
        raise ConfigError(f"unknown formatting “{entry['formatting']}”", where=where, hint="It is alpaca or sharegpt.")
    for key, known in (("columns", {*COLUMNS, *MEDIA}), ("tags", {"role_tag", "content_tag", *TAGS})):
        given = entry.get(key) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"“{key}” is no object", where=where)
        for name, value in given.items():
            if name not in known or not isinstance(value, str | None):
                raise ConfigError(f"“{key}” names “{name}”: {value!r}", where=where,
                                  hint=f"Known are {', '.join(sorted(known))}, each with a name.")
    media = [name for name in MEDIA if (entry.get("columns") or {}).get(name)]
    if media:
        raise ConfigError(f"the dataset has {media[0]}, which danlu does not read", where=where)
    samples = entry.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ConfigError("“num_samples” is no number above 0", where=where)
