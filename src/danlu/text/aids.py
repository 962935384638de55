"""What cleaning looks things up in, from the files that `text/learn.py` leaves beside the spool, and the block lists.

    aids = load_aids(config, base, folder)          # by any process; models are mapped, not read
    clean(text, config, aids)
"""

from pathlib import Path

import numpy as np

from danlu.text import blocklists
from danlu.text.boilerplate import LINE, Boilerplate
from danlu.text.clean import Aids, CleanConfig
from danlu.text.ngram import CharNgram

BOILERPLATE = "boilerplate.npy"  # LINE [lines]; `first` is the split in which a line stands first


def model_folder(folder: Path, number: int) -> Path:
    """Where the model of the entry of `perplexity` with that number is."""
    return folder / f"perplexity-{number}"


def load_aids(config: CleanConfig, base: Path, folder: Path) -> Aids:
    """All that the rules of the recipe need. Raises ConfigError for a block list that cannot be read."""
    boilerplate = None
    if config.boilerplate is not None:
        boilerplate = Boilerplate.of(np.load(folder / BOILERPLATE), config.boilerplate)
    models = {part.language: (CharNgram.load(model_folder(folder, number)), part.max_perplexity)
              for number, part in enumerate(config.perplexity)}
    return Aids(blocklists.load(config.blocklists, base), boilerplate, models)


def shown_lines(config: CleanConfig, folder: Path, split: int, num: int) -> dict[int, int]:
    """Of the `num` lines in most documents those that stand first in this split: by key, in how many they are."""
    if config.boilerplate is None:
        return {}
    lines = np.load(folder / BOILERPLATE)
    assert lines.dtype == LINE, lines.dtype
    most = lines[np.lexsort((lines["key"], lines["first"], -lines["documents"].astype(np.int64)))[:num]]
    return {int(line["key"]): int(line["documents"]) for line in most if line["first"] == split}
