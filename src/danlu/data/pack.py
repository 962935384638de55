"""Cutting a step's examples into micro-batches that fit into memory. How it is cut cannot change the result."""

from collections.abc import Sequence

from danlu.core.examples import Example


def micro_batches(examples: Sequence[Example], micro_batch_tokens: int) -> list[list[Example]]:
    """Groups of examples with at most so many tokens each, in order; a longer example stands alone.

    The groups are made about alike in size, so that the last one is no short remainder (a model is fastest on even work).
    """
    groups: list[list[Example]] = []
    room = 0
    total = sum(example.num_tokens for example in examples)
    wanted = max(1, -(-total // micro_batch_tokens))
    even = min(micro_batch_tokens, -(-total // wanted) + max((e.num_tokens for e in examples), default=0) // 2)
    for example in examples:
        if not groups or example.num_tokens > room:
            groups.append([])
            room = even
        groups[-1].append(example)
        room -= example.num_tokens
    return groups
