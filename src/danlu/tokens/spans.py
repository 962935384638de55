"""Where in a rendered dialogue the assistant speaks: found without markers, for any template that writes what was said.

What is said is replaced by unique words and rendered; the text between the words is what the template writes. With the real
contents put back the pieces must give the real rendering, else fewer contents are replaced, in the end none. An answer
begins where the prompt ends that a model gets before it answers, and ends with the first token after it that ends a turn.

It is *kept* if the dialogue up to its end stands in the whole rendering as it would stand alone. Templates that strip the
thinking from earlier turns, or write an end of turn behind the last one only, do not keep it: learned there, it would teach
a model something else than what it has to say when it answers. Such a rendering is `rewritten`, and only its last answer
has a span.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from danlu.tokens.template import TEMPLATE_ERRORS

Span = tuple[int, int]
Turn = Mapping[str, Any]  # a message as templates see it
Raw = Callable[[Sequence[Turn], Sequence[Mapping[str, Any]], bool], str]  # turns, tools, generation prompt

MAX_SHAPES = 4096  # layouts of dialogues that are remembered
MAX_REMEMBERED = 20_000  # characters of one
MAX_LAYOUTS = 1024  # renderings of words that are remembered: beginnings of a dialogue share them
ROLES = frozenset({"system", "user", "assistant", "tool"})
LEVELS = (ROLES, frozenset({"assistant"}), frozenset[str]())  # whose contents are replaced by words, first try first
FIELDS = ("reasoning_content", "content")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue's text. All ranges are characters, start and end.

    spans      what can be learned: each answer with its end of turn; of a rewritten text the last one's alone
    contents   by the message's index, where its thinking and its content stand, as far as that is known
    cuts       where the answers begin that stand in the text as they were said
    rewritten  whether the template wrote earlier answers otherwise than they were said
    """

    text: str
    spans: list[Span]
    contents: dict[int, list[Span]] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    rewritten: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A content that a word stands for, and the white space that precedes it."""

    message: int
    name: str
    word: str
    lead: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What the template writes around the contents: piece, content, piece, content, …, piece.

    contents  (message, field) of each
    edges     of each answer: where it begins and ends, both as (piece, character); None where it is not kept
    """

    pieces: tuple[str, ...]
    contents: tuple[tuple[int, str], ...]
    edges: tuple[tuple[Span, Span] | None, ...]


class _Lost(Exception):
    """A marked content did not come out of the template once."""


class Finder:
    """Finds the spans of one template's renderings.

    raw     renders turns; raises TEMPLATE_ERRORS
    stops   the texts of the tokens that end a turn
    header  what stands before an answer, where the template knows no generation prompt
    """

    def __init__(self, raw: Raw, stops: Sequence[str], header: str) -> None:
        self.raw, self.stops, self.header = raw, stops, header
        self._shapes: dict[tuple, Shape] = {}
        self._layouts: dict[tuple, str] = {}

    def find(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], text: str, generation: bool
             ) -> Rendered | None:
        """The text with its spans; None where not even the last answer is found in it."""
        answered = not generation and bool(turns) and turns[-1]["role"] == "assistant"
        for roles in LEVELS:
            try:
                shape = self._shape(turns, tools, generation, roles)
            except (_Lost, *TEMPLATE_ERRORS):
                continue
            found = _fill(shape, turns, text)
            if found is not None and (found.spans or not answered):
                return found
        return None

    def _shape(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], generation: bool,
               roles: Collection[str]) -> Shape:
        if roles is not ROLES or tools or any("tool_calls" in turn for turn in turns):
            return self._make_shape(turns, tools, generation, roles)
        key = (generation, *((turn["role"], *(_key(turn.get(name)) for name in FIELDS)) for turn in turns))
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._make_shape(turns, tools, generation, roles)
            if len(self._shapes) < MAX_SHAPES:
                self._shapes[key] = shape
        return shape

    def _make_shape(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], generation: bool,
                    roles: Collection[str]) -> Shape:
        marked, marks = _mark(turns, roles)
        text = self._layout(marked, tools, generation)
        found: list[tuple[int, Mark]] = []
        for mark in marks:
            count = text.count(mark.word)
            if count == 1:
                found.append((text.index(mark.word), mark))
            elif count or mark.name == "content":  # thinking may be left out, answers may not
                raise _Lost
        found.sort(key=lambda item: item[0])
        pieces, starts, at = [], [], 0
        for place, mark in found:
            pieces.append(text[at:place])
            starts.append(at)
            at = place + len(mark.word)
        pieces.append(text[at:])
        starts.append(at)

        def edge(place: int) -> Span:
            number = bisect_right(starts, place) - 1
            return number, place - starts[number]

        edges = []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                span = self._span(marked, i, tools, text, generation, [mark for mark in marks if mark.message == i])
                edges.append(None if span is None else (edge(span[0]), edge(span[1])))
        return Shape(tuple(pieces), tuple((mark.message, mark.name) for _, mark in found), tuple(edges))

    def _layout(self, marked: Sequence[Turn], tools: Sequence[Mapping[str, Any]], generation: bool) -> str:
        """The rendering of marked turns, which are short, so that it is remembered."""
        if tools or any("tool_calls" in turn for turn in marked):
            return self.raw(marked, tools, generation)
        key = (generation, *((turn["role"], *(turn.get(name) for name in FIELDS)) for turn in marked))
        text = self._layouts.get(key)
        if text is None:
            text = self.raw(marked, tools, generation)
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            if len(text) <= MAX_REMEMBERED:
                self._layouts[key] = text
        return text

    def _span(self, marked: Sequence[Turn], i: int, tools: Sequence[Mapping[str, Any]], text: str, generation: bool,
              marks: Sequence[Mark]) -> Span | None:
        """The span of answer `i` in the marked text; None where it does not stand there as it does when it is the last."""
        whole = i == len(marked) - 1 and not generation
        try:
            through = text if whole else self._layout(marked[:i + 1], tools, False)
        except TEMPLATE_ERRORS:
            return None
        begin = self._begin(marked[:i], tools, through, marks)
        if begin is None:
            return None
        after = max((through.find(mark.word) + len(mark.word) for mark in marks if mark.word in through), default=begin)
        end = end_of_turn(through, after, self.stops)
        return (begin, end) if end is not None and text.startswith(through[:end]) else None

    def _begin(self, before: Sequence[Turn], tools: Sequence[Mapping[str, Any]], through: str, marks: Sequence[Mark]
               ) -> int | None:
        """Where an answer begins: behind the prompt; where there is no prompt, with what is said."""
        first = min((through.find(mark.word) for mark in marks if mark.word in through), default=None)
        if before:
            try:
                prompt = self._layout(before, tools, True) + self.header
            except TEMPLATE_ERRORS:
                pass
            else:
                fits = through.startswith(prompt) and (first is None or len(prompt) <= first)
                return len(prompt) if fits else None
        if first is None:
            return None
        lead = marks[0].lead
        return first - len(lead) if through[:first].endswith(lead) else first


def end_of_turn(text: str, start: int, stops: Sequence[str]) -> int | None:
    """The end of the first stop token from there on; of those that begin at one place the longest."""
    found = [(text.find(stop, start), -len(stop)) for stop in stops]
    place, length = min((item for item in found if item[0] >= 0), default=(-1, 0))
    return None if place < 0 else place - length


def _mark(turns: Sequence[Turn], roles: Collection[str]) -> tuple[list[dict[str, Any]], list[Mark]]:
    """The turns with words in the place of what these roles say. White space around it stays, and blank contents do."""
    words = iter(_words(len(FIELDS) * len(turns), "".join(turn.get(name) or "" for turn in turns for name in FIELDS)))
    marked, marks = [], []
    for i, turn in enumerate(turns):
        changed = dict(turn)
        for name in FIELDS if turn["role"] in roles else ():
            said = turn.get(name) or ""
            core = said.strip()
            if core:
                lead, trail = _borders(said)
                marks.append(Mark(i, name, next(words), lead))
                changed[name] = lead + marks[-1].word + trail
        marked.append(changed)
    return marked, marks


def _key(said: str | None) -> Any:
    """What of a content decides how it is laid out: the white space around it, or all of it where it is blank."""
    return _borders(said) if said and said.strip() else said


def _borders(content: str) -> tuple[str, str]:
    """The white space before and after the content proper."""
    core = content.lstrip()
    lead = content[:len(content) - len(core)]
    return lead, core[len(core.rstrip()):]


def _words(count: int, text: str) -> list[str]:
    """Words of letters that occur nowhere in the text and not in each other."""
    stem = "zqxj"
    while stem in text:
        stem += "qzxj"[len(stem) % 4]
    return [stem + "".join("abcdefghij"[int(digit)] for digit in f"{i:05d}") + "k" for i in range(count)]


def _fill(shape: Shape, turns: Sequence[Turn], text: str) -> Rendered | None:
    """Puts the contents between the pieces; None unless that is the real rendering."""
    cores = [turns[message][name].strip() for message, name in shape.contents]
    parts = [part for pair in zip(shape.pieces, cores) for part in pair] + [shape.pieces[-1]]
    if "".join(parts) != text:
        return None
    starts = [0, *accumulate(len(part) for part in parts)]  # of piece k at 2k, of content k at 2k + 1
    contents: dict[int, list[Span]] = {}
    for k, (message, _) in enumerate(shape.contents):
        contents.setdefault(message, []).append((starts[2 * k + 1], starts[2 * k + 2]))
    spans = [None if edges is None else (starts[2 * edges[0][0]] + edges[0][1], starts[2 * edges[1][0]] + edges[1][1])
             for edges in shape.edges]
    kept = [span for span in spans if span is not None]
    rewritten = len(kept) < len(spans)
    learned = kept if not rewritten else [span for span in spans[-1:] if span is not None]
    return Rendered(text, learned, contents, [start for start, _ in kept], rewritten)
