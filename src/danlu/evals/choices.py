"""Questions with a choice of answers, and clozes: rows of local files to Items, in the shapes in which such sets are had.

    {"query": "…", "choices": ["…", "…"], "gold": 1}       also question/options/label, question/choices/answerKey (with
                                                           texts and labels), ctx/endings, goal/sol1/sol2, a passage before
    {"question": "… A．… B．… C．…", "answer": ["B"]}        answers inside the question, as in exam papers
    question,A,B,C,D,answer                                a CSV with these column names, or without any as MMLU is had
    {"context_options": ["…", "…"], "continuation": "…", "gold": 0}      which beginning makes the end more probable; also
                                                           a sentence with _ where option1 or option2 (answer 1 or 2) goes
    {"context": "…", "continuation": "…"}                  a cloze: what comes next; of {"text": "…"} it is the last word
    {"name": "…", "example": [{…}, {…}]}                   a file that is one object, with the questions in a list

An Item is contexts and continuations, whose log-probabilities are compared. Answers are compared by their `text`, or by
their `letter` after the lettered list: columns A to D and `options` mean letters, `choices` mean texts, unless the recipe
says otherwise. Between context and answer stands one blank, and none after a wide (Chinese) character.
"""

import csv
import re
import unicodedata
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Any, Literal

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.text.characters import HAN
from danlu.text.clean import language
from danlu.text.fields import BadRow, Values, known_values, unknown_shape
from danlu.text.files import DATA_SUFFIXES, Located, suffix_of
from danlu.text.lines import (
    MARKUP,
    MAX_LINE_BYTES,
    UNREADABLE,
    Gate,
    Value,
    as_json,
    kind_of,
    open_text,
    refuse_value,
    unreadable,
)
from danlu.text.registry import counted, find
from danlu.text.rows import read_values
from danlu.text.tables import read_csv

Answers = Literal["letter", "text"]
CHINESE_MARKS = "”’…—"  # that English has, too
HAN_LETTER = re.compile(f"[{HAN}。，！？；：、]")
BETWEEN = "\n\n"  # examples and the question
PASSAGES = ("passage", "context", "support")
QUESTIONS = ("query", "question", "question_stem", "ctx", "goal")
OPTIONS = ("choices", "options", "endings")
GOLDS = ("gold", "answerkey", "label", "answer", "answer_index", "target")
PLACES = ("gold", "label", "answer_index")  # they say which answer, never what it reads
MORE_LINES = 100  # that the first row of a CSV file may go on for
LABELLED = ("Question:", "Q:", "问题：")  # questions that say that they are one, and want to be told that an answer comes
_SPLIT = re.compile(r"[_-](test|dev|val|valid|validation|train)$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_LETTERED = re.compile(r"\s*[(（]?([A-Z])[)）.．、:：]\s*")
_MARK = re.compile(r"(?<![!-~])[(（]?([A-Z])[)）.．、:：]\s*")  # behind a blank, a line end or what is not ASCII


@dataclass(frozen=True, slots=True)
class Item:
    """One question. There are as many contexts as continuations, or one of either for all.

    gold     the place of the right one
    subject  the file's name without `_test` or `_dev`: examples are taken from the same one
    cloze    there is nothing to choose from: is the continuation what the model would say?
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    subject: str
    id: str
    cloze: bool = False

    @property
    def num_choices(self) -> int:
        """How many pairs of context and continuation are compared."""
        return max(len(self.contexts), len(self.continuations))

    def pair(self, place: int) -> tuple[str, str]:
        """Context and continuation of one choice."""
        return (self.contexts[min(place, len(self.contexts) - 1)],
                self.continuations[min(place, len(self.continuations) - 1)])

    @property
    def solved(self) -> str:
        """The question with its right answer, as an example for others."""
        return "".join(self.pair(self.gold))

    @property
    def num_bytes(self) -> int:
        """Of all contexts and continuations, in UTF-8."""
        return sum(len(text.encode()) for text in self.contexts + self.continuations)


def read_items(path: str, base: Path, ledger: Ledger, answers: Answers | None = None) -> list[Item]:
    """The questions behind `path`, counted at the station `read:<path>`.

    Raises ConfigError if nothing is there, DataError if no row is a question or too many are refused.
    """
    found = find(path, base, DATA_SUFFIXES)
    gate = Gate(f"read:{path}", ledger)

    def read() -> Generator[Item, None, None]:
        for located in found.files:
            values = _read_nameless(located, gate) if _is_nameless(located) else read_values(located, gate)
            for value in chain.from_iterable(_inside(value, gate) for value in values):
                if not isinstance(value.value, dict):
                    refuse_value(gate, value, f"not an object but {kind_of(value.value)}")
                    continue
                row = found.row(value.value)
                try:
                    item = to_item(row, value.where, _subject(row, located.label), answers)
                except BadRow as error:
                    refuse_value(gate, value, error.reason, kind=error.kind)
                    continue
                gate.columns(row.read(), row.unread())
                gate.give(item.num_bytes, value.bytes)
                yield item

    items = list(counted(read(), found, gate))
    gate.finish()
    if not items:
        first = f" (the first row: {ledger.quarantined[0].reason})" if ledger.quarantined else ""
        raise DataError(f"holds no question with answers to choose from, and no cloze{first}", where=path)
    return items


def _inside(value: Value, gate: Gate) -> Iterator[Value]:
    """A value, or the questions in it where it is a whole file, an object that holds one list of them and no question."""
    fields = value.value if value.whole and isinstance(value.value, dict) else {}
    lists = [name for name, rows in fields.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(lists) != 1 or any(str(name).lower() in (*QUESTIONS, "continuation", "sentence", "text") for name in fields):
        yield value
        return
    [name], left = lists, value.bytes
    gate.split("questions in one object", len(fields[name]) - 1)
    for number, row in enumerate(fields[name]):
        size = min(left, len(as_json(row).encode("utf-8", "replace")))
        left -= size
        yield Value(f"{value.where} ({name}[{number}])", row, size)
    gate.station.drop(MARKUP, bytes=left)


def _subject(row: Values, label: str) -> str:
    """What a question is about: as its row says, or its file."""
    said = row.get("subject")
    return said.strip() if isinstance(said, str) and said.strip() else subject_of(label)


def subject_of(label: str) -> str:
    """What a file's questions are about, by its name: `abstract_algebra` of `abstract_algebra_test.csv`, and of
    `abstract_algebra/test-00000-of-00001.parquet`."""
    path = PurePosixPath(label)
    name = path.name
    while (stem := PurePosixPath(name).stem) != name and "." in name:
        name = stem
    name = _SHARD.sub("", name)
    return _SPLIT.sub("", path.parent.name if _SPLIT.fullmatch(f"_{name}") and path.parent.name else name)


def to_item(row: Values, where: str, subject: str, answers: Answers | None = None) -> Item:
    """The question of one row. Raises BadRow where the row cannot be meant."""
    names = {str(name).strip().lower(): name for name in reversed(list(known_values(row)))}

    def has(*wanted: str) -> bool:
        return all(name in names for name in wanted)

    if has("context_options", "continuation"):
        options = [text.rstrip() for text in _texts(row[names["context_options"]], "context_options")]
        gold = _gold(row, names, options, letters=False)
        return Item(tuple(options), (_joined(options[gold], _text(row, names["continuation"])),), gold, subject, where)
    if has("sentence", "option1", "option2", "answer"):
        return _gap(row, names, where, subject)
    if has("context", "continuation"):
        context = _text(row, names["context"]).rstrip()
        return Item((context,), (_joined(context, _text(row, names["continuation"])),), 0, subject, where, cloze=True)
    if "text" in names and not any(name in names for name in (*QUESTIONS, *OPTIONS)):
        context, _, last = _text(row, names["text"]).rstrip().rpartition(" ")
        if not context.strip():
            raise BadRow("one word only", "there is nothing before the last word")
        return Item((context.rstrip(),), (f" {last}",), 0, subject, where, cloze=True)
    return _choice(row, names, where, subject, answers)


def _gap(row: Values, names: Mapping[str, Any], where: str, subject: str) -> Item:
    """A sentence with a gap for one of two words, as WinoGrande is published: which makes the rest more probable?"""
    before, gap, after = _text(row, names["sentence"]).partition("_")
    gold = str(row[names["answer"]]).strip()
    if not gap or not after.strip() or gold not in ("1", "2"):
        raise BadRow("no gap" if not gap or not after.strip() else "right answer unknown",
                     "“sentence” holds no _ with text behind it" if gold in ("1", "2") else f"“answer” is “{gold[:40]}”")
    contexts = tuple(before + _text(row, names[f"option{number}"]).strip() for number in (1, 2))
    return Item(contexts, (after.rstrip(),), int(gold) - 1, subject, where)


def _choice(row: Values, names: Mapping[str, Any], where: str, subject: str, answers: Answers | None) -> Item:
    """A question with answers to choose from."""
    asked = next((name for name in QUESTIONS if name in names), None)
    if asked is None:
        raise unknown_shape(row)
    question = row[names[asked]]
    inside = question if isinstance(question, dict) else {}  # ARC as it was published: {"stem": …, "choices": […]}
    text = _text(inside, "stem") if inside else _text(row, names[asked])
    text, options, labels, lettered = _options(row, names, inside, text)
    gold = _gold(row, names, options, labels=labels)
    before = next((name for name in PASSAGES if name in names and row[names[name]]), None)
    passage = "" if before is None else f"{_text(row, names[before]).strip()}\n"
    zh = language(text + "".join(options)) == "zh"
    if (answers or ("letter" if lettered else "text")) == "text":
        closed = text.strip() if text.startswith(LABELLED) else f"{'问题：' if zh else 'Question: '}{text.strip()}" \
            if lettered else text.rstrip()
        if (lettered or text.startswith(LABELLED)) and not closed.endswith(("Answer:", "答案：", "A:")):
            closed += "\n答案：" if zh else "\nAnswer:"
        context, said = passage + closed, options
    else:
        letters = list(ascii_uppercase[:len(options)])
        listed = [] if options == letters else [f"{letter}. {option}" for letter, option in zip(letters, options)]
        closing = [] if text.rstrip().endswith(("Answer:", "答案：", "answer is")) else ["答案：" if zh else "Answer:"]
        context, said = passage + "\n".join([text.strip(), *listed, *closing]), letters
    return Item((context,), tuple(_joined(context, answer) for answer in said), gold, subject, where)


def _options(row: Values, names: Mapping[str, Any], inside: Values, text: str) -> tuple[str, list[str], list[str], bool]:
    """The question without its answers, these, the labels that they go by ([]: none), and whether letters are how such
    sets ask for them."""
    columns = [letter for letter in ascii_uppercase[:10] if letter.lower() in names]
    name = next((name for name in OPTIONS if name in names), None)
    if name is not None or "choices" in inside:
        listed = row[names[name]] if name is not None else inside["choices"]
        texts, labels = _listed(listed, name or "choices")
        lettered = name == "options"
    elif {"sol1", "sol2"} <= set(names):
        texts, labels, lettered = [_text(row, names[key]) for key in ("sol1", "sol2")], [], False
    elif columns[:2] == ["A", "B"]:
        texts, labels, lettered = [_text(row, names[letter.lower()]) for letter in columns], columns, True
    elif written := _written(text):
        (text, *texts), labels, lettered = written, [], True
    else:
        raise unknown_shape(row)
    if len(texts) < 2:
        raise BadRow("fewer than two answers")
    if len(texts) > len(ascii_uppercase):
        raise BadRow("too many answers", f"{len(texts)}, more than there are letters")
    if lettered:  # “(A) …”: the letters are written by the prompt
        marks = [_LETTERED.match(text) for text in texts]
        if all(mark is not None and mark[1] == letter for mark, letter in zip(marks, ascii_uppercase)):
            texts = [text[mark.end():] for text, mark in zip(texts, marks) if mark is not None]
    return text, [text.strip() for text in texts], labels, lettered


def _written(text: str) -> list[str]:
    """A question that ends with its answers, taken apart: “…（　） A．… B．… C．…”; [] where it does not.

    As many answers as follow each other in the alphabet, from the last A on: an earlier one may be a part of the text.
    """
    marks = list(_MARK.finditer(text))
    begins = [place for place, mark in enumerate(marks) if mark[1] == "A"]
    if not begins:
        return []
    following = zip(marks[begins[-1]:], ascii_uppercase)
    found = [mark for mark, _ in takewhile(lambda pair: pair[0][1] == pair[1], following)]
    ends = [mark.start() for mark in found[1:]] + [len(text)]
    return [text[:found[0].start()], *(text[mark.end():end] for mark, end in zip(found, ends))] if len(found) > 1 else []


def _listed(value: Any, name: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a list of answers: texts, objects of text and label, or an object of two lists."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label")
        return _texts(value["text"], name), [str(label) for label in labels] if isinstance(labels, list) else []
    if isinstance(value, dict):
        return _texts(list(value.values()), name), list(map(str, value))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return (_texts([item.get("text") for item in value], name),
                [str(item["label"]) for item in value if item.get("label") is not None])
    return _texts(value, name), []


def _gold(row: Values, names: Mapping[str, Any], options: Sequence[str], *, labels: Sequence[str] = (),
          letters: bool = True) -> int:
    """The place of the right answer: a number from 0, a label, a letter, or the answer itself (but under PLACES)."""
    name = next((name for name in GOLDS if name in names), None)
    if name is None:
        raise BadRow("no right answer", f"none of the fields {', '.join(GOLDS)} is there")
    value = row[names[name]]
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRow("not one right answer", f"“{name}” names {len(value)}")
        [value] = value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("wrong type", f"“{name}” is no number and no text but {kind_of(value)}")
    text = str(value).strip()
    listed = next((row[names[key]] for key in OPTIONS if key in names), None)
    is_place = isinstance(value, int) and not (isinstance(listed, list) and any(type(item) is int for item in listed))
    if text in labels and len(labels) == len(options):
        return list(labels).index(text)
    places = set()
    if text.isascii() and text.isdecimal():
        places.add(int(text))
    elif letters and len(text) == 1 and text.upper() in ascii_uppercase:
        places.add(ascii_uppercase.index(text.upper()))
    meant = {place for place in places if place < len(options)}
    if name not in PLACES and not is_place and text in options:  # “2” may be the third answer, or the answer 2
        meant.add(list(options).index(text))
    if len(meant) > 1:
        raise BadRow("right answer ambiguous", f"“{name}” is “{text}”, an answer, and the number or letter of another")
    if not meant:
        raise BadRow("right answer unknown", f"“{name}” is “{text}”, and there are {len(options)} answers" if places else
                     f"“{name}” is “{text[:40]}”, which is none of the answers")
    return meant.pop()


def _text(row: Values, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"“{name}” is no text but {kind_of(value)}")
    if not value.strip():
        raise BadRow("empty text", f"“{name}”")
    return value


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
        raise BadRow("wrong type", f"“{name}” is no list of texts but {kind_of(value)}")
    texts = [str(item) for item in value]
    if any(not text.strip() for text in texts):
        raise BadRow("empty text", f"“{name}” holds an answer without text")
    return texts


def _joined(context: str, answer: str) -> str:
    """The answer as it follows the context: behind a blank, unless either is Chinese where they meet."""
    answer = answer.strip()
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in context[-1:] + answer[:1])
    quoted = context[-1:] in CHINESE_MARKS and any(HAN_LETTER.match(character) for character in context[-3:-1])
    return answer if wide or quoted or not context else f" {answer}"


# CSV without column names: question, answers, and the letter of the right one, as MMLU is published. ------------------


def _is_nameless(located: Located) -> bool:
    """Whether a CSV's first row is a question already: at least four cells, of which the last is one letter of them."""
    if suffix_of(located.path) != ".csv":
        return False
    try:
        with open_text(located) as file:
            first = file.readline(MAX_LINE_BYTES).decode("utf-8-sig", "replace")
            more = (line.decode("utf-8", "replace") for line in islice(file, MORE_LINES))
            cells = next(csv.reader(chain([first], more)), [])
    except UNREADABLE as error:
        raise unreadable(located, error) from error
    except csv.Error:
        return False
    last = cells[-1].strip() if cells else ""
    return len(cells) >= 4 and len(last) == 1 and last in ascii_uppercase[:len(cells) - 2]


def _read_nameless(located: Located, gate: Gate) -> Iterator[Value]:
    """The rows of such a file under the names question, A, B, … and answer."""
    return read_csv(located, gate, names=lambda cells: None if cells < 4 else
                    ["question", *ascii_uppercase[:cells - 2], "answer"])
