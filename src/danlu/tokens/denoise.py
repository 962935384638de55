"""Corrupting text for a model to mend: masked tokens, spans behind sentinels, infilling, and a middle moved to the end.

A document is stored once, whole. What is done to it is a function of the stored Example and of a generator that the caller
keys by the place where the example is drawn (`danlu.data.noisy`), so that every pass sees another corruption, a resumed run
the same ones, and neither micro-batch nor ranks matter. A stored example is one branch: its content has the weight 1, the
special tokens that frame it ([CLS] … [SEP]) have 0; columns say of each token which word and which sentence it is of.

    noise = Masked(mask_id=4, ordinary=ordinary_ids(tokenizer))
    corrupted = noise(example, np.random.default_rng(0))

`Masked` gives one branch, the corrupted text, whose column `original` holds what stood there: its sites are read at their
own places. `SpanCorruption` and `Infilling` give a stem for an encoder and a branch for a decoder. `FillInMiddle` gives a
causal model's branch.
"""

from dataclasses import dataclass, replace

import numpy as np

from danlu.core.examples import ORIGINAL, Branch, Example

MASKS = ("[MASK]", "<mask>", "<|mask|>")  # special tokens that are known to be a mask by their name
WORD, SENTENCE = "word", "sentence"  # columns: the number of the word and of the sentence that a token belongs to


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """Masked language modelling (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

    Of n tokens max(1, round(probability·n)) are chosen; of these 80 % become the mask, 10 % a random ordinary token, 10 %
    stay. Whole words are taken in a random order, and those that do not fit into what is left of that number are passed
    over, as BERT's own code does it; where none fits, so many tokens of the first one are chosen.

    mask_id   what stands in place of a token
    ordinary  int [k]: ids that a random token is drawn from
    """

    mask_id: int
    ordinary: np.ndarray
    probability: float = 0.15
    whole_words: bool = False

    def __call__(self, example: Example, draw: np.random.Generator) -> Example:
        """The example with masked tokens; its weights are 1 where something is to be mended."""
        [branch] = example.branches
        places = np.flatnonzero(branch.weights)
        chosen = places[self._choose(branch.columns[WORD][places] if self.whole_words else None, len(places), draw)]
        tokens, kind = branch.tokens.copy(), draw.random(len(chosen))
        tokens[chosen[kind < 0.8]] = self.mask_id
        others = chosen[(kind >= 0.8) & (kind < 0.9)]
        tokens[others] = draw.choice(self.ordinary, len(others))
        weights = np.zeros(len(tokens), np.float32)
        weights[chosen] = 1
        return replace(example, branches=(Branch(tokens, weights, {ORIGINAL: branch.tokens.astype(np.float32)}),))

    def _choose(self, words: np.ndarray | None, count: int, draw: np.random.Generator) -> np.ndarray:
        """Which of `count` tokens are to be mended, in their order."""
        wanted = min(count, max(1, round(self.probability * count)))
        if words is None:
            return np.sort(draw.permutation(count)[:wanted])
        _, word, sizes = np.unique(words, return_inverse=True, return_counts=True)
        taken, room = list[int](), wanted
        order = draw.permutation(len(sizes))
        for number in order:
            if sizes[number] <= room:
                taken.append(number)
                room -= sizes[number]
            if room == 0:
                break
        return np.flatnonzero(np.isin(word, taken)) if taken else np.flatnonzero(word == order[0])[:wanted]


@dataclass(frozen=True, slots=True, eq=False)
class SpanCorruption:
    """T5's span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 and figure 2).

    max(1, round(density·n)) tokens in about density·n / mean_length spans are taken out. Every span leaves a sentinel of
    its own in the text; the target is each sentinel with what it stands for, and one more sentinel at the end. Every
    division of the tokens into so many spans is equally probable, and then every choice of places where spans do not touch.

    sentinels  ids in the order in which they are used; one more than there are spans at most
    """

    sentinels: np.ndarray
    density: float = 0.15
    mean_length: float = 3.0

    def __call__(self, example: Example, draw: np.random.Generator) -> Example:
        """Stem: the text with sentinels; branch: what they stand for, and the token that ends a text."""
        before, content, after = content_of(example)
        source: list[np.ndarray] = [before]
        target: list[np.ndarray] = []
        end = 0
        for number, (start, length) in enumerate(zip(*self._spans(len(content), draw), strict=True)):
            mark = self.sentinels[number:number + 1]
            source += [content[end:start], mark]
            end = start + length
            target += [mark, content[start:end]]
        target += [self.sentinels[len(target) // 2:][:1], after]
        return replace(example, stem=np.concatenate([*source, content[end:], after]),
                       branches=(Branch(np.concatenate(target)),))

    def _spans(self, count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Where the spans begin, in their order, and how long they are."""
        noisy = min(count, max(1, round(self.density * count)))
        number = min(max(1, round(noisy / self.mean_length)), noisy, count - noisy + 1)
        lengths = division(noisy, number, draw)
        return starts_of(lengths, count, 1, draw), lengths


def num_spans(count: int, density: float, mean_length: float) -> int:
    """How many spans a text of so many tokens loses at most."""
    return max(1, round(max(1, round(density * count)) / mean_length))


@dataclass(frozen=True, slots=True, eq=False)
class Infilling:
    """BART's noise (Lewis et al. 2020, arXiv:1910.13461, section 2.2): the decoder says the whole text again.

    The sentences are put into a random order; spans of Poisson(λ) tokens, together `ratio` of the text, are replaced by one
    mask each (a span of no tokens inserts a mask); of what is left a share is deleted without a trace.
    """

    mask_id: int
    ratio: float = 0.3
    poisson_lambda: float = 3.0
    permute_sentences: float = 1.0
    delete_ratio: float = 0.0

    def __call__(self, example: Example, draw: np.random.Generator) -> Example:
        """Stem: the corrupted text; branch: the text as it was. Both are framed by the same special tokens."""
        before, content, after = content_of(example)
        noisy = content
        if self.permute_sentences:
            [branch] = example.branches
            noisy = permuted(content, branch.columns[SENTENCE][branch.weights != 0], self.permute_sentences, draw)
        noisy = self._infill(noisy, draw)
        if self.delete_ratio:
            plain = np.flatnonzero(noisy != self.mask_id)
            noisy = np.delete(noisy, draw.permutation(plain)[:round(self.delete_ratio * len(plain))])
        return replace(example, stem=np.concatenate([before, noisy, after]),
                       branches=(Branch(np.concatenate([before, content, after])),))

    def _infill(self, tokens: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """The text with masks. It never grows beyond its length: insertions that had no room are left out."""
        wanted = round(self.ratio * len(tokens))
        lengths: list[int] = []
        left = wanted
        while left:
            lengths.append(min(int(draw.poisson(self.poisson_lambda)), left))
            left -= lengths[-1]
        spans = np.array([length for length in lengths if length], np.int64)
        inserted = min(len(lengths) - len(spans), wanted - len(spans))
        kept, end = [], 0
        for start, length in zip(starts_of(spans, len(tokens), 0, draw), spans, strict=True):
            kept += [tokens[end:start], np.array([self.mask_id], np.int32)]
            end = start + length
        noisy = np.concatenate([*kept, tokens[end:]]).astype(np.int32)
        return np.insert(noisy, draw.integers(0, len(noisy) + 1, inserted), self.mask_id)


@dataclass(frozen=True, slots=True, eq=False)
class FillInMiddle:
    """Fill in the middle (Bavarian et al. 2022, arXiv:2207.14255, sections 3 and 3.1), on pieces of a causal model's text.

    A piece is cut at two places, each equally probable, into prefix, middle and suffix, and with probability `rate` becomes

        PSM: <prefix> prefix <suffix> suffix <middle> middle        SPM: <prefix> <suffix> suffix <middle> prefix middle

    Every token is learned, the three special ones too. What begins the piece (bos, or the token before as context) and the
    eos at its end stay where they are. Examples with a prompt, or with context inside, are left alone.
    """

    prefix_id: int
    suffix_id: int
    middle_id: int
    end_id: int
    rate: float = 0.5
    spm_rate: float = 0.5

    def __call__(self, example: Example, draw: np.random.Generator) -> Example:
        """The example, or its pieces in the other order."""
        moved, spm = draw.random() < self.rate, draw.random() < self.spm_rate
        branch = example.branches[0]
        if not moved or len(example.stem) or len(branch.tokens) < 3 or not branch.weights[1:].all():
            return example
        tokens = branch.tokens
        end = len(tokens) - int(tokens[-1] == self.end_id)
        one, two = np.sort(draw.integers(1, end + 1, 2))
        prefix, middle, suffix = tokens[1:one], tokens[one:two], tokens[two:end]
        if spm:
            parts = [[self.prefix_id], [self.suffix_id], suffix, [self.middle_id], prefix, middle]
        else:
            parts = [[self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle]
        joined = np.concatenate([tokens[:1], *parts, tokens[end:]])
        weights = np.ones(len(joined), np.float32)
        weights[:1] = branch.weights[:1]
        return replace(example, branches=(Branch(joined, weights),))


def content_of(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(what stands before the content, the content, what stands after it) of a stored example."""
    [branch] = example.branches
    places = np.flatnonzero(branch.weights)
    start, end = int(places[0]), int(places[-1]) + 1
    return branch.tokens[:start], branch.tokens[start:end], branch.tokens[end:]


def division(total: int, parts: int, draw: np.random.Generator) -> np.ndarray:
    """`total` as a sum of so many positive whole numbers, every such sum equally probable; int64 [parts]."""
    cuts = np.sort(draw.permutation(total - 1)[:parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def starts_of(lengths: np.ndarray, count: int, apart: int, draw: np.random.Generator) -> np.ndarray:
    """Where spans of these lengths begin among `count` tokens, with at least `apart` tokens between neighbours."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    number = len(lengths)
    free = count - int(lengths.sum()) - apart * (number - 1)
    gaps = division(free + number + 1, number + 1, draw) - 1  # at both ends and between them
    return np.cumsum(gaps[:-1]) + np.concatenate([[0], np.cumsum(lengths[:-1] + apart)])


def permuted(tokens: np.ndarray, sentences: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """The tokens with a share of their sentences changing places among themselves."""
    cuts = np.flatnonzero(np.diff(sentences)) + 1
    parts = np.split(tokens, cuts)
    moved = draw.permutation(len(parts))[:round(share * len(parts))]
    order = np.arange(len(parts))
    order[np.sort(moved)] = moved
    return np.concatenate([parts[place] for place in order])
