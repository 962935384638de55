"""Cutting a step's examples into micro-batches that fit into memory. How it is cut cannot change the result."""

from collections.abc import Sequence

from danlu.core.examples import Example
from danlu.data.store import ExampleStore


def micro_batches(examples: Sequence[Example], micro_batch_tokens: int, padded: bool = False) -> list[list[Example]]:
    """Groups of examples with at most so many tokens each, in order; a longer example stands alone.

    `padded`: for models that cannot pack, where every branch is a row as long as the longest one.
    """
    groups = (cut_padded([rows_of(example) for example in examples], micro_batch_tokens) if padded else
              cut([example.num_tokens for example in examples], micro_batch_tokens))
    return [[examples[index] for index in group] for group in groups]


def cut(lengths: Sequence[int], micro_batch_tokens: int) -> list[range]:
    """Ranges of neighbours with at most so many tokens each; what is longer stands alone.

    They are made about alike in size, so that the last one is no short remainder (a model is fastest on even work).
    """
    total = sum(lengths)
    wanted = max(1, -(-total // micro_batch_tokens))
    even = min(micro_batch_tokens, -(-total // wanted) + max(lengths, default=0) // 2)
    starts: list[int] = []
    room = 0
    for index, length in enumerate(lengths):
        if not starts or length > room:
            starts.append(index)
            room = even
        room -= length
    return _ranges(starts, len(lengths))


def cut_padded(rows: Sequence[tuple[int, int]], micro_batch_tokens: int) -> list[range]:
    """The same for examples that are given as (number of rows, length of the longest)."""
    starts: list[int] = []
    count = width = 0
    for index, (more, length) in enumerate(rows):
        if not starts or (count + more) * max(width, length) > micro_batch_tokens:
            starts.append(index)
            count = width = 0
        count, width = count + more, max(width, length)
    return _ranges(starts, len(rows))


def cut_store(store: ExampleStore, indices: Sequence[int], micro_batch_tokens: int, padded: bool) -> list[list[int]]:
    """Those examples of a store in groups, for passes that read them as they are needed."""
    ranges = (cut_padded([rows_of(store[index]) for index in indices], micro_batch_tokens) if padded else
              cut([int(store.lengths[index]) for index in indices], micro_batch_tokens))
    return [[indices[place] for place in group] for group in ranges]


def rows_of(example: Example) -> tuple[int, int]:
    """(number of rows, length of the longest) of an example whose every branch is a row with its stem."""
    return len(example.branches), len(example.stem) + max(len(branch.tokens) for branch in example.branches)


def _ranges(starts: list[int], end: int) -> list[range]:
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], end])]
