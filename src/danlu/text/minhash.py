"""Near duplicates: MinHash signatures, the bands that find candidates, and the check that alone removes.

A text is the set of its shingles, runs of `shingle` units (a word, or one Han character). Two texts are near duplicates
where the Jaccard similarity |A ∩ B| / |A ∪ B| of their sets reaches `threshold`. The share of equal places in two
signatures estimates it without bias (Broder, On the resemblance and containment of documents, 1997), with a standard
deviation of √(J(1 − J)/num_perm): 0.04 for 0.75 and 112 places.

Texts that agree in one band of `rows` places are candidates; that happens with probability 1 − (1 − J^rows)^bands
(Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4). Unlike in the usual clustering, a candidate is
removed only where its similarity with a text that *stays* passes. So a chain of texts, each like the next, loses only what
is like its neighbour that stays, and not the whole chain.

    config = NearConfig()
    own, other = signature(text, config), signature(another, config)
    (band_keys(own, config) == band_keys(other, config)).any() and similarity(own, other) >= config.threshold
"""

from functools import cache

import numpy as np
from pydantic import Field, model_validator

from danlu.core.config import Config
from danlu.text.characters import mix64, ngrams, units

BLOCK = 1024  # shingles that are hashed at once: the block of all permutations stays in the cache
KEPT = -1


class NearConfig(Config):
    """What counts as a near duplicate. The defaults are FineWeb's bands: 14 of 8 rows."""

    threshold: float = Field(default=0.75, gt=0, le=1, description="least Jaccard similarity with a document that stays")
    shingle: int = Field(default=5, ge=1, description="units (words, Han characters) in a shingle")
    bands: int = Field(default=14, ge=1, description="bands of a signature; agreeing in one makes a candidate")
    rows: int = Field(default=8, ge=1, description="places in a band; bands x rows is the number of permutations")
    seed: int = Field(default=1, ge=0, description="of the permutations")

    @model_validator(mode="after")
    def _near_has_places(self) -> "NearConfig":
        if self.bands * self.rows > 4096:
            raise ValueError("bands x rows is the length of a signature, at most 4096")
        return self

    @property
    def num_perm(self) -> int:
        """Permutations, that is places of a signature."""
        return self.bands * self.rows


@cache
def _permutations(num_perm: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [num_perm, 1] twice: x → a·x + b mod 2³² is one to one, for a is odd."""
    values = mix64(np.arange(2 * num_perm, dtype=np.uint64) + np.uint64(seed << 20)).astype(np.uint32)
    return values[:num_perm, None] | np.uint32(1), values[num_perm:, None]


def shingles(text: str, config: NearConfig) -> np.ndarray:
    """uint32 [shingles]: the hash of each shingle, with repetitions; none where a text has no letter or number."""
    return (ngrams(units(text), config.shingle) >> np.uint64(32)).astype(np.uint32)


def signature_of(hashes: np.ndarray, config: NearConfig) -> np.ndarray:
    """uint32 [num_perm]: for each permutation the smallest hash; all ones for an empty set."""
    factors, terms = _permutations(config.num_perm, config.seed)
    smallest = np.full(config.num_perm, 0xffffffff, np.uint32)
    for start in range(0, len(hashes), BLOCK):
        permuted = factors * hashes[start:start + BLOCK]
        permuted += terms
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return smallest


def signature(text: str, config: NearConfig) -> np.ndarray:
    """uint32 [num_perm]: a text's signature."""
    return signature_of(shingles(text, config), config)


def band_keys(signatures: np.ndarray, config: NearConfig) -> np.ndarray:
    """uint64 [..., bands]: a key for each band of signatures [..., num_perm]; equal bands have equal keys."""
    places = signatures.reshape(*signatures.shape[:-1], config.bands, config.rows).astype(np.uint64)
    order = np.arange(config.bands * config.rows, dtype=np.uint64).reshape(config.bands, config.rows)
    return mix64((mix64(places | (order << np.uint64(32)))).sum(axis=-1, dtype=np.uint64))


def similarity(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 [...]: the share of equal places of a signature [num_perm] and others [..., num_perm], the estimate of J."""
    return (one == others).mean(axis=-1)


def is_empty(one: np.ndarray) -> bool:
    """Whether a signature is that of a text without shingles; such a text is like no other."""
    return bool((one == 0xffffffff).all())
