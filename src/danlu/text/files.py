"""Where sources are: files, folders, globs, files inside installed packages, and the modules of packages.

Nothing is ever imported to be found: packages are located through their specs, and a path inside a package cannot
leave it. Every file comes with a label, which is what the user wrote plus what was found below it; labels, not absolute
paths, go into records, so that the same corpus has the same bytes on every machine.

    locate("texts/", base)                          texts/a.txt, texts/b.md, …
    locate("package:chatterbot_corpus/data/english", base)
    modules("json")                                 ("json", …/json/__init__.py), ("json.decoder", …), …
"""

import glob
import importlib.machinery
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from danlu.core.errors import ConfigError

PACKAGE = "package:"
DOCSTRINGS = "docstrings:"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
YAML_SUFFIXES = (".yml", ".yaml")
PAGE_SUFFIXES = (".html", ".htm", ".xhtml")
ARCHIVE = ".tar"
WEB_SUFFIXES = (*PAGE_SUFFIXES, ".warc", ".wet", ".xml", ARCHIVE)  # read as documents only
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # may follow any of them but those of Parquet and Arrow
SHORT_FORMS = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}  # of .tar.gz, …
ROW_SUFFIXES = TEXT_SUFFIXES + DATA_SUFFIXES + YAML_SUFFIXES
ALL_SUFFIXES = ROW_SUFFIXES + WEB_SUFFIXES


def suffix_of(path: Path) -> str:
    """What the file's name says it holds: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`, `.gz` of `a.gz`; in lower case."""
    suffix = path.suffix.lower()
    if suffix in SHORT_FORMS:
        return ARCHIVE
    return Path(path.stem).suffix.lower() or suffix if suffix in COMPRESSED else suffix


def compression_of(path: Path) -> str:
    """One of COMPRESSED, as the file's name says; "" for none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else SHORT_FORMS.get(suffix, "")


@dataclass(frozen=True, slots=True)
class Located:
    """A file and the name by which people know it; or whole lines or row groups of it, where it is read in pieces.

    begin, end  bytes of the first line and behind the last one, of Parquet its row groups; None: to the end of the file
    line        the number of the first line or row
    limit       bytes to which it may expand, where it is compressed; None: as many as its size allows
    """

    path: Path
    label: str
    begin: int = 0
    end: int | None = None
    line: int = 1
    limit: int | None = None


def resolve(path: str, base: Path) -> list[Path]:
    """The concrete files behind a file, a folder, a glob, `package:NAME/path` or `docstrings:NAME,NAME`; sorted.

    Relative paths are tried against the current directory, then against `base`. Raises ConfigError if nothing is there.
    """
    if path.startswith(DOCSTRINGS):
        return sorted({file for name in docstring_names(path) for _, file in modules(name)})
    return sorted(located.path for located in locate(path, base))


def locate(path: str, base: Path, suffixes: tuple[str, ...] = ALL_SUFFIXES) -> list[Located]:
    """Like `resolve`, with labels, for everything but `docstrings:`; from folders only files with these suffixes."""
    if path.startswith(PACKAGE):
        return _locate_in_package(path, suffixes)
    if not path.strip():
        raise ConfigError("an empty path names no source")
    roots, inside, prefix = _places(path, base)
    for root in roots:
        found = _below(root, inside, suffixes)
        if found:
            for label, file in found:
                if any("\ud800" <= character <= "\udfff" for character in label):  # bytes that are no text
                    raise ConfigError(f"the name of the file {os.fsencode(file)!r} is not UTF-8", hint="Rename it.")
            return [Located(file, prefix + label) for label, file in found]
    raise ConfigError(f"nothing is found at “{path}”", hint=_hint(roots, inside, suffixes))


def _places(path: str, base: Path) -> tuple[list[Path], str, str]:
    """The folders below which a path may be, the path below them, and what stands before that in labels."""
    plain = Path(path).expanduser()
    if plain.is_absolute():
        return [Path(plain.anchor)], plain.relative_to(plain.anchor).as_posix(), plain.anchor
    return list(dict.fromkeys([Path.cwd(), base])), plain.as_posix(), ""


def passed_over(path: str, base: Path, suffixes: tuple[str, ...] = ALL_SUFFIXES) -> dict[str, int]:
    """How much of a folder `locate` passes over, by why: {"files of other kinds": 2}; of what is no folder nothing."""
    if path.startswith((PACKAGE, DOCSTRINGS)):
        return {}
    roots, inside, _ = _places(path, base)
    target = next((root / inside for root in roots if _below(root, inside, suffixes)), None)
    found: dict[str, int] = {}
    if target is None or not target.is_dir():
        return found
    for entry in target.rglob("*"):
        link = entry.is_symlink() and entry.is_dir()
        if any(part.startswith(".") for part in entry.relative_to(target).parts):
            why = "hidden files" if entry.is_file() else ""
        elif link:
            why = "links to folders"
        else:
            why = "files of other kinds" if entry.is_file() and suffix_of(entry) not in suffixes else ""
        if why:
            found[why] = found.get(why, 0) + 1
    return found


def _below(root: Path, inside: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(path relative to root, file) for a file, a folder or a glob below a root; sorted by the relative path."""
    target = root / inside
    if target.is_file():
        return [(inside, target)]
    if target.is_dir():
        files = [(file.relative_to(target), file) for file in target.rglob("*") if suffix_of(file) in suffixes]
        prefix = "" if inside == "." else inside.rstrip("/") + "/"
        return sorted((prefix + relative.as_posix(), file) for relative, file in files
                      if file.is_file() and not any(part.startswith(".") for part in relative.parts))
    if glob.has_magic(inside):
        names = sorted(set(_matching(root, PurePosixPath(inside).parts)))
        return [(name, root / name) for name in names if (root / name).is_file()]
    return []


def _matching(root: Path, pattern: Sequence[str], name: str = "") -> Iterator[str]:
    """What the parts of a pattern match below `root`, by the rules of `glob`; some of it may come twice.

    `**` goes through links to folders, too, but not back to a folder that it came from: `glob` would go round for ever.
    """
    if not pattern:
        yield name
        return
    first, rest = pattern[0], pattern[1:]
    here = root / name
    if not glob.has_magic(first):
        yield from _matching(root, rest, f"{name}/{first}".lstrip("/")) if (here / first).exists() else ()
        return
    if first == "**":
        yield from _matching(root, rest or ("*",), name)
    for entry in sorted(here.iterdir()) if here.is_dir() else ():
        hidden = entry.name.startswith(".") and not first.startswith(".")
        if hidden or not fnmatchcase(entry.name, first):
            continue
        below = f"{name}/{entry.name}".lstrip("/")
        if first != "**":
            yield from _matching(root, rest, below)
        elif entry.is_dir() and not (entry.is_symlink() and here.resolve().is_relative_to(entry.resolve())):
            yield from _matching(root, pattern, below)


def _hint(roots: list[Path], inside: str, suffixes: tuple[str, ...]) -> str:
    for root in roots:
        if (root / inside).is_dir():
            return f"The folder holds no file that ends in {', '.join(suffixes)}."
    tried = " and in ".join(dict.fromkeys(str(root) for root in roots))
    return f"It is no file, no folder and no pattern that matches; tried in {tried}."


def _locate_in_package(path: str, suffixes: tuple[str, ...]) -> list[Located]:
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    if ".." in PurePosixPath(inside).parts or inside.startswith("/"):
        raise ConfigError(f"“{path}” leaves its package", hint="Write package:NAME/path/inside without “..”.")
    for root in package_folders(name):
        found = _below(root, inside or ".", suffixes)
        outside = [file for _, file in found if not file.resolve().is_relative_to(root.resolve())]
        if outside:
            raise ConfigError(f"“{path}” leaves its package through a link", where=str(outside[0]))
        if found:
            return [Located(file, f"{PACKAGE}{name}/{label}") for label, file in found]
    raise ConfigError(f"nothing is found at “{path}”", hint=f"“{name}” is installed, but has no such file or folder.")


def package_folders(name: str) -> list[Path]:
    """The folders of an installed package, or of what a distribution of that name installs. ConfigError if absent."""
    spec = _spec(name) or _spec(name.replace("-", "_"))
    if spec is not None and spec.submodule_search_locations:
        folders = [Path(place) for place in spec.submodule_search_locations]
    elif spec is not None and spec.origin and Path(spec.origin).is_file():
        raise ConfigError(f"“{name}” is a single module, not a package with files inside")
    else:
        folders = _distribution_folders(name)
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise ConfigError(f"the package “{name}” is not installed here as a folder", hint=f"Try: pip install {name}")
    return folders


def _distribution_folders(name: str) -> list[Path]:
    try:
        files = importlib.metadata.distribution(name).files or [] if name else []
    except importlib.metadata.PackageNotFoundError:
        return []
    tops = sorted({(file.parts[0], Path(str(file.locate()))) for file in files if len(file.parts) > 1})
    folders = {top: Path(*place.parts[:place.parts.index(top) + 1]) for top, place in tops
               if top in place.parts and not top.endswith((".dist-info", ".egg-info")) and top != ".."}
    return [folders[top] for top in sorted(folders)]


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a top-level name, found without importing anything (a dotted name would import its parent)."""
    if not name.isidentifier():
        return None
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is not None:
        return spec
    try:
        return importlib.util.find_spec(name)
    except (ValueError, ImportError):  # a module without a spec (`__main__`), or a finder of its own that fails
        return None


def docstring_names(path: str) -> list[str]:
    """The names in `docstrings:NAME,NAME`. Raises ConfigError if there is none or one is no module name."""
    names = [name.strip() for name in path.removeprefix(DOCSTRINGS).split(",")]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"“{name}” in “{path}” is no module name", hint="Write docstrings:json,email.mime")
    return list(dict.fromkeys(names))


def modules(name: str) -> list[tuple[str, Path]]:
    """(dotted name, .py file) of every module of a package, sorted by name; of a single module, itself.

    `name` may be dotted (`email.mime`): the part below the top-level package is walked as a path.
    """
    top, *rest = name.split(".")
    spec = _spec(top)
    if spec is None:
        raise ConfigError(f"“{top}” is not installed here", hint=f"Try: pip install {top}")
    if not spec.submodule_search_locations:
        file = Path(spec.origin) if spec.origin and spec.has_location else None
        if rest or file is None or file.suffix != ".py":
            raise ConfigError(f"“{name}” has no Python source to read docstrings from")
        return [(name, file)]
    found: dict[str, Path] = {}
    for place in spec.submodule_search_locations:
        _walk(Path(place).joinpath(*rest), name, found)
    if not found:
        raise ConfigError(f"“{name}” has no Python source to read docstrings from")
    return sorted(found.items())


def _walk(folder: Path, name: str, found: dict[str, Path]) -> None:
    if folder.with_suffix(".py").is_file() and "." in name:
        found.setdefault(name, folder.with_suffix(".py"))
    for file in sorted(folder.rglob("*.py")):
        parts = list(file.relative_to(folder).with_suffix("").parts)
        if any(not part.isidentifier() for part in parts):
            continue  # scripts and templates with names that nobody can import
        if parts[-1] == "__init__":
            parts.pop()
        found.setdefault(".".join([name, *parts]), file)
