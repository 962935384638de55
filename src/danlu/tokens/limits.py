"""What becomes of a dialogue that is too long: the policies, by name, each counted at the station `overlong`.

    turns     keep the first whole turns (`keep_end`: the last ones), with the system message
    tokens    cut at the limit (`keep_end`: at the beginning); an answer that is cut ends without an end of turn
    split     further examples of the later turns, each with the system message
    drop      drop it
    error     stop

The limits are `cutoff_len` for the whole, and for every turn `max_source_length`, what leads to an answer, and
`max_target_length`, the answer with its end. With `tokens` a source is cut inside what was said, never in the template, so
that an answer still stands behind its header; of a target the first tokens stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from danlu.core.errors import DataError
from danlu.core.ledger import Station
from danlu.core.records import Message

Overlong = Literal["turns", "tokens", "split", "drop", "error"]
TruncationMode = Literal["keep_start", "keep_end"]


@dataclass(frozen=True, slots=True)
class Side:
    """One turn in tokens: [start, answer) leads to the answer, [answer, end) is the answer with its end.

    said  the stretches of the source that people wrote, the longest first
    """

    start: int
    answer: int
    end: int
    said: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A tokenised dialogue: int32 and float32 [n], and its turns, as far as they are learned."""

    ids: np.ndarray
    weights: np.ndarray
    sides: tuple[Side, ...] = ()
    last_only: bool = False  # whether nothing but the last answer is learned


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits in tokens, and what happens to what is longer."""

    cutoff_len: int
    overlong: Overlong = "turns"
    truncation_mode: TruncationMode = "keep_start"
    max_source_length: int | None = None
    max_target_length: int | None = None

    def exceeded(self, row: Row) -> str:
        """The limit that a row is longer than, or ""."""
        if len(row.ids) > self.cutoff_len:
            return "cutoff_len"
        for name, limit, sizes in (("max_source_length", self.max_source_length, (s.answer - s.start for s in row.sides)),
                                   ("max_target_length", self.max_target_length, (s.end - s.answer for s in row.sides))):
            if limit is not None and any(size > limit for size in sizes):
                return name
        return ""

    def shorten(self, messages: Sequence[Message], row: Row, again: Callable[[Sequence[Message]], Row | None], where: str,
                station: Station) -> list[Row]:
        """What the policy makes of a row that exceeds a limit. `again` renders and tokenises other turns; None where the
        template refuses them."""
        count, limit = len(row.ids), self.exceeded(row)
        if self.overlong == "error":
            raise DataError(f"the dialogue has {count} tokens; it exceeds {limit}", where=where,
                            hint=f"Raise {limit} or choose overlong: turns, tokens, split or drop.")
        station.take(rows=1, tokens=count)
        if self.overlong == "drop":
            station.drop(f"longer than {limit}", rows=1, tokens=count)
            return []
        if self.overlong == "tokens":
            return self._cut(row, station)

        def fitting(chosen: Sequence[Message]) -> Row | None:
            made = again(chosen)
            return made if made is not None and not self.exceeded(made) else None

        if self.overlong == "split" and not row.last_only:
            kept, lost = _all_turns(messages, row, fitting)
        elif self.truncation_mode == "keep_end" or row.last_only:
            kept, lost = _last_turns(messages, row, fitting)
        else:
            kept, lost = _first_turns(messages, row, fitting, self.cutoff_len)
        if not kept:
            station.drop(f"no turn fits {limit}", rows=1, tokens=count)
            return []
        tokens = sum(len(part.ids) for part in kept)
        if lost:
            station.drop(f"turns longer than {limit}" if self.overlong == "split" else f"turns beyond {limit}", tokens=lost)
        if len(kept) > 1:
            station.add("later turns in rows of their own", rows=len(kept) - 1)
        if tokens + lost > count:
            station.add("template and system message again", tokens=tokens + lost - count)
        elif tokens + lost < count:
            station.drop("template between turns", tokens=count - tokens - lost)
        station.give(rows=len(kept), tokens=tokens)
        return kept

    def _cut(self, row: Row, station: Station) -> list[Row]:
        """The row with its sources and targets cut, then the whole."""
        gone = np.zeros(len(row.ids), bool)
        for side in row.sides:
            excess = side.answer - side.start - (self.max_source_length or len(row.ids))
            for start, end in side.said:
                taken = min(max(excess, 0), end - start)
                gone[slice(start, start + taken) if self.truncation_mode == "keep_end" else slice(end - taken, end)] = True
                excess -= taken
            if excess > 0:
                station.drop("the template fills max_source_length", rows=1, tokens=len(row.ids))
                return []
            if self.max_target_length is not None:
                gone[side.answer + self.max_target_length:side.end] = True
        ids, weights = row.ids[~gone], row.weights[~gone]
        if gone.any():
            station.drop("tokens beyond max_source_length and max_target_length", tokens=int(gone.sum()))
        if len(ids) > self.cutoff_len:
            station.drop("tokens beyond cutoff_len", tokens=len(ids) - self.cutoff_len)
            stay = slice(-self.cutoff_len, None) if self.truncation_mode == "keep_end" else slice(self.cutoff_len)
            ids, weights = ids[stay], weights[stay]
        weights[:1] = 0  # nothing predicts what is now the first token
        station.give(rows=1, tokens=len(ids))
        return [Row(ids, weights, last_only=row.last_only)]


def keep_turns(ends: Sequence[int], limit: int) -> int:
    """How many turns fit: `ends` are the token counts up to the end of each. 0 where not even the first does."""
    return sum(1 for end in ends if end <= limit)


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages at the beginning, and the turns: what leads to an answer, and the answer.

    Calls of tools, what they give back and the answer that follows belong to one turn.
    """
    at = 0
    while at < len(messages) and messages[at].role == "system":
        at += 1
    turns: list[list[Message]] = [[]]
    for place, message in enumerate(messages[at:], at):
        turns[-1].append(message)
        following = messages[place + 1].role if place + 1 < len(messages) else ""
        if message.role == "assistant" and following != "tool":
            turns.append([])
    return list(messages[:at]), [turn for turn in turns if turn]


Fitting = Callable[[Sequence[Message]], Row | None]


def _ends(turns: Sequence[Sequence[Message]], row: Row) -> list[int]:
    """The token count up to the end of each turn, which may hold several answers."""
    answers = [sum(message.role == "assistant" for message in turn) for turn in turns]
    ends, seen = [], 0
    for count in answers:
        seen += count
        ends.append(row.sides[seen - 1].end if seen else 0)
    return ends


def _first_turns(messages: Sequence[Message], row: Row, fitting: Fitting, cutoff_len: int) -> tuple[list[Row], int]:
    """One row of the first turns, rendered anew, and how many tokens the others had."""
    head, turns = split_turns(messages)
    ends = _ends(turns, row)
    for count in range(keep_turns(ends, cutoff_len), 0, -1):
        kept = fitting([*head, *chain(*turns[:count])])
        if kept is not None:
            return [kept], ends[-1] - ends[count - 1]
    return [], 0


def _last_turns(messages: Sequence[Message], row: Row, fitting: Fitting) -> tuple[list[Row], int]:
    """One row of the last turns, rendered anew, and how many tokens the others had."""
    head, turns = split_turns(messages)
    for first in range(1, len(turns)):
        kept = fitting([*head, *chain(*turns[first:])])
        if kept is not None:
            return [kept], max(0, len(row.ids) - len(kept.ids))
    return [], 0


def _all_turns(messages: Sequence[Message], row: Row, fitting: Fitting) -> tuple[list[Row], int]:
    """Rows of as many whole turns as fit, and how many tokens those turns had that do not fit alone."""
    head, turns = split_turns(messages)
    ends = _ends(turns, row)
    rows: list[Row] = []
    start = lost = 0
    while start < len(turns):
        best, end = None, start
        while end < len(turns) and (made := fitting([*head, *chain(*turns[start:end + 1])])) is not None:
            best, end = made, end + 1
        if best is None:
            lost += ends[start] - (ends[start - 1] if start else 0)
            end = start + 1
        else:
            rows.append(best)
        start = end
    return rows, lost
