"""The items of evaluation sets that a corpus must not hold: read as a corpus's sources are, kept once a process.

    items = read_items(config, base, ledger)    # {"arc": ["Which of these …", …]}
    index_of(config, base).found(text)
"""

from functools import lru_cache
from pathlib import Path

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.text.decontaminate import Contamination, DecontaminateConfig
from danlu.text.read import SourceConfig, read_documents


def read_items(config: DecontaminateConfig, base: Path, ledger: Ledger) -> dict[str, list[str]]:
    """By set, its items: each field of a row by itself, and each line of plain text. DataError where a set has none.

    The ledger gets the stations of each set's reading, with what was refused and is not looked for.
    """
    items: dict[str, list[str]] = {}
    for part in config.sets:
        found = items.setdefault(part.name, [])
        for field in part.fields or [""]:
            source, book = SourceConfig(path=part.path, field=field or None, document="line"), Ledger()
            found += [document.text for document in read_documents(source, base, book)]
            ledger.absorb(book, f"{part.name}{f', {field}' if field else ''}: ")
        if not found:
            raise DataError(f"the evaluation set “{part.name}” has no items", where=part.path)
    return items


def index_of(config: DecontaminateConfig, base: Path) -> Contamination:
    """The index of all sets; made once a process."""
    return _index(config.model_dump_json(), base)


@lru_cache(maxsize=1)
def _index(settings: str, base: Path) -> Contamination:
    config = DecontaminateConfig.model_validate_json(settings)
    return Contamination(read_items(config, base, Ledger()), config)
