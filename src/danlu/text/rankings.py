"""Several answers to one prompt, in an order: rows to Rankings.

    {"prompt": "…", "responses": ["the best", "…", "the worst"]}
    {"prompt": "…", "responses": ["…", "…"], "scores": [3.5, 4.0]}               more is better; or "ranks": less is
    {"prompt": "…", "answers": [{"answer": "…", "rank": 1}, {"answer": "…", "rank": 2}]}
    {"prompt": "…", "chosen": …, "rejected": …}                                  any preference: a ranking of two

The prompt is whatever `danlu.text.preferences` reads as one. Of answers that are equally good, or equal, the first is
kept.
"""

from collections.abc import Iterator
from pathlib import Path

from danlu.core.ledger import Ledger
from danlu.core.records import Ranking
from danlu.text.answers import answer_text, in_order, scores_of
from danlu.text.fields import BadRow, Values, known_values, unpacked
from danlu.text.formats import Rows, read_records
from danlu.text.messages import tools_of
from danlu.text.preferences import PAIRS, prompt_of, to_preference
from danlu.text.rows import MAX_REFUSED, Gate

LISTS = ("responses", "answers", "completions", "response", "output", "outputs")


def to_ranking(row: Values, where: str, source: str, category: str = "preference") -> Ranking:
    """The ranking of one row; `where` becomes its id. Raises BadRow where the row cannot be meant."""
    if any(name in row for pair in PAIRS for name in pair) or "output_1" in row:
        pair = to_preference(row, where, source, category)
        return Ranking(pair.messages, (pair.chosen, pair.rejected), source, where, category, pair.tools)
    messages = prompt_of(row)
    answers = in_order(row, *listed_answers(row))
    if len(answers) < 2:
        raise BadRow("only one answer")
    return Ranking(tuple(messages), tuple(answers), source, where, category, tools_of(row))


def listed_answers(row: Values) -> tuple[str, list[str], list[float] | None]:
    """The list's name, its answers as they stand, and how good each is, more being better (None: the best stands first).

    Raises BadRow where the row has no list of answers.
    """
    known = known_values(row)
    name = next((name for name in LISTS if name in known), None)
    if name is None:
        raise BadRow("only one answer", "there is no list of answers")
    listed = unpacked(row[name])
    if not isinstance(listed, list):
        raise BadRow("only one answer")
    return name, [answer_text(item, name, row) for item in listed], scores_of(row, name, listed)


def read_rankings(path: str, base: Path, ledger: Ledger, *, category: str = "preference",
                  max_refused: float = MAX_REFUSED) -> Iterator[Ranking]:
    """The rankings of what `path` names, counted and refused as `read_preferences` counts and refuses."""
    gate = Gate(f"read:{path}", ledger, max_refused)
    yield from read_records(path, base, gate, category, Rows("rankings", to_ranking))
