"""Dialogues as text, and where in that text the assistant speaks: for any checkpoint's own chat template.

The learned spans are found without markers in the template. Every content is replaced by a unique word, the dialogue
is rendered, and the text between the words is what the template writes. With the real contents put back the pieces must
give the real rendering, or the template rewrites what was said and is refused by name. An answer's span begins where
the prompt ends that a model gets before it answers (so that whatever the template writes in between is learned too),
and ends with the token that ends the turn. The line end that some templates write after it is not part of it.

    chat = Chat(tokenizer)
    rendered = chat.render(messages)
    [rendered.text[start:end] for start, end in rendered.spans]      # ["Fine.<|im_end|>", …]
    chat.prompt_ids(messages)                                        # what a model continues
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.tokens.codec import Codec, Encoded, Segment
from danlu.tokens.template import TEMPLATE_ERRORS, Template

SPELLS_SPECIAL = "spells a special token"
MAX_SHAPES = 4096  # layouts of dialogues that are remembered
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue's text. All ranges are characters, start and end.

    spans     what is learned: each assistant content with its end of turn
    contents  the contents of the messages, as far as they are known
    """

    text: str
    spans: list[Span]
    contents: list[Span]


@dataclass(frozen=True, slots=True)
class Slot:
    """A content's place between two pieces of template text.

    message  index of the message
    before   characters of the piece before it that belong to its span
    after    characters of the piece after it that belong to its span
    ends     whether those hold the end of the turn
    """

    message: int
    before: int = 0
    after: int = 0
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What the template writes around the contents: piece, content, piece, content, …, piece."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]


class _Lost(Exception):
    """A marked content did not come out of the template once and in order."""


class Chat:
    """Renders dialogues with the template of a transformers fast tokenizer.

    stop_ids  further ids that end a turn (a checkpoint's generation config may name them)
    now       the clock for templates that write a date; a fixed date unless given, so that equal input gives equal text

    Raises ConfigError where the tokenizer has no usable template.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int] = (), now: Callable[[], datetime] | None = None,
                 codec: Codec | None = None) -> None:
        self.codec = codec or Codec(tokenizer)
        self.name = f"the chat template of “{tokenizer.name_or_path or 'this tokenizer'}”"
        self.template = Template(_source(tokenizer), self.name, tokenizer.special_tokens_map, now)
        backend = self.codec.special
        texts = [tokenizer.eos_token] + [backend.id_to_token(token) for token in sorted(stop_ids)]
        self._stops = [text for text in texts if text]
        self._shapes: dict[tuple, Shape] = {}
        self._why_no_spans = ""
        self._header = ""
        self._probe()
        self._needs_cut = self.codec.can_cut and self._prompt_changes_alone()

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a turn: generation stops at any of them."""
        found = (self.codec.special.token_to_id(text) for text in self._stops)
        return sorted({token for token in found if token is not None})

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The text with its spans; with a generation prompt those of the earlier answers, as far as they are known.

        Raises DataError where the template refuses this dialogue, ConfigError where the spans cannot be found.
        """
        plain = _plain(messages)
        text = self._render(plain)
        if add_generation_prompt:
            prompt = self._render(plain, add_generation_prompt=True)
            found, _ = self._find(plain, text) if prompt.startswith(text) else (None, None)
            return Rendered(prompt, found.spans if found else [], found.contents if found else [])
        found, shape = self._find(plain, text)
        if found is None or shape is None:
            raise ConfigError(f"{self.name}: assistant spans cannot be found: the template rewrites, repeats or drops "
                              "what was said (it may strip reasoning from earlier answers)",
                              hint="Use a template that writes every message as it is, for example danlu's own.")
        self._require_ends(shape, plain)
        return found

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """The text that a model continues. A template that knows no generation prompt gets the answer's header.

        Raises DataError where the template refuses the messages, and where they spell a special token that `encode`
        could not keep as ordinary text.
        """
        rendered = self.render(messages, add_generation_prompt=True)
        if self.exposed(messages, rendered):
            raise DataError(f"a message {SPELLS_SPECIAL}, and {self.name} and its tokenizer cannot keep it as text")
        return Rendered(rendered.text + self._header, rendered.spans, rendered.contents)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the prompt, as chat and evaluation feed them."""
        return self.encode([self.prompt(messages)])[0].ids.tolist()

    def exposed(self, messages: Sequence[Message], rendered: Rendered) -> bool:
        """Whether a message spells a special token that would become a real one.

        A content is kept as ordinary text where its place in the rendering is known and the tokenizer can be cut.
        """
        found = [message for message in messages if self.codec.holds_special(message.content)]
        if not found or not self.codec.can_cut:
            return bool(found)
        answers = sum(message.role == "assistant" for message in messages)
        if len(rendered.contents) == len(messages):
            return False
        return len(rendered.contents) != answers or any(message.role != "assistant" for message in found)

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokenises each text once. Raises DataError for a content that `exposed` finds in a tokenizer without cuts.

        Cut, and tokenised apart, is only: a content that spells a special token (it stays ordinary text); the start of
        a learned span where otherwise one token would hold the end of the prompt and the beginning of the answer. That
        is also how it comes about at generation time, where the prompt is tokenised without the answer.
        """
        rows = [self._segments(row, cut=self._needs_cut) for row in rendered]
        encoded = self.codec.encode(rows)
        if self.codec.can_cut and not self._needs_cut:
            torn = [i for i, row in enumerate(encoded) if straddles(row, rendered[i].spans)]
            again = self.codec.encode([self._segments(rendered[i], cut=True) for i in torn])
            for i, row in zip(torn, again):
                encoded[i] = row
        return encoded

    # How the template is understood ------------------------------------------------------------------------------

    def _render(self, plain: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            return self.template.render(plain, add_generation_prompt)
        except TEMPLATE_ERRORS as error:
            raise DataError(f"{self.name} refuses this dialogue: {error}") from None

    def _probe(self) -> None:
        """Learns from one exchange which token ends an answer and what stands before one."""
        words = _sentinels(2, "")
        exchange = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]
        try:
            text = self.template.render(exchange)
            question = self.template.render(exchange[:1])
            prompt = self.template.render(exchange[:1], add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            self._why_no_spans = f"it cannot render a question and its answer: {error}"
            return
        if text.count(words[1]) != 1:
            self._why_no_spans = "it does not write the answer exactly once"
            return
        begin = text.index(words[1])
        if prompt == question and text.startswith(prompt) and text[len(prompt):begin].strip():
            self._header = text[len(prompt):begin].rstrip(" ")
        after = text[begin + len(words[1]):]
        if _end_of_turn(after, "", self._stops)[1]:
            return
        special = [word for word in self.codec.added_texts if after.lstrip().startswith(word)]
        if special:
            self._stops.append(special[0])  # they are sorted, the longest first
        else:
            shown = f"the text {after[:20]!r}" if after else "nothing"
            self._why_no_spans = (f"after an answer it writes {shown}, no special token; the end of a turn would never "
                                  "be learned, and generation would never stop")

    def _prompt_changes_alone(self) -> bool:
        """Whether the prompt's last tokens depend on the answer that follows (a splitter that looks ahead)."""
        messages = [Message("user", "hi")]
        try:
            prompt = self.prompt(messages).text
        except DataError:
            return False
        texts = [prompt, *(prompt + word for word in ("Yes", "1", "("))]
        alone, *followed = (self.codec.special.encode(text, add_special_tokens=False).ids for text in texts)
        return any(ids[:len(alone)] != alone for ids in followed)

    def _find(self, plain: Sequence[Mapping[str, str]], text: str) -> tuple[Rendered | None, Shape | None]:
        """The spans of a rendering. Where the template looks into what a user says, only the answers are marked."""
        for marked_roles in (ROLES, frozenset({"assistant"})):
            try:
                shape = self._shape(plain, marked_roles)
            except (_Lost, *TEMPLATE_ERRORS):
                continue
            found = _fill(shape, plain, text)
            if found is not None:
                return found, shape
        return None, None

    def _shape(self, plain: Sequence[Mapping[str, str]], marked_roles: Collection[str]) -> Shape:
        borders = [(message["role"], *_borders(message["content"])) for message in plain]
        if marked_roles is not ROLES:
            return self._make_shape(plain, borders, marked_roles)
        key = tuple(borders)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._make_shape(plain, borders, marked_roles)
            if len(self._shapes) < MAX_SHAPES:
                self._shapes[key] = shape
        return shape

    def _make_shape(self, plain: Sequence[Mapping[str, str]], borders: Sequence[tuple[str, str, str]],
                    marked_roles: Collection[str]) -> Shape:
        words = _sentinels(len(plain), "".join(message["content"] for message in plain))
        marked = [{"role": role, "content": lead + word + trail} if role in marked_roles else message
                  for message, word, (role, lead, trail) in zip(plain, words, borders)]
        text = self.template.render(marked)
        chosen = [i for i, message in enumerate(marked) if message["role"] in marked_roles]
        pieces, starts, at = [], [], 0
        for i in chosen:
            begin = text.find(words[i], at)
            if begin < 0 or text.count(words[i]) != 1:
                raise _Lost
            pieces.append(text[at:begin])
            starts.append(begin)
            at = begin + len(words[i])
        pieces.append(text[at:])
        slots = []
        for k, i in enumerate(chosen):
            role, lead, trail = borders[i]
            if role == "assistant":
                before = self._before(marked[:i], text, starts[k], pieces[k], lead)
                slots.append(Slot(i, before, *_end_of_turn(pieces[k + 1], trail, self._stops)))
            else:
                slots.append(Slot(i))
        return Shape(tuple(pieces), tuple(slots))

    def _before(self, prompt_messages: Sequence[Mapping[str, str]], text: str, begin: int, piece: str,
                lead: str) -> int:
        """How many characters before a content are learned: all that the prompt for it does not hold."""
        kept = len(lead) if piece.endswith(lead) else 0
        if not prompt_messages:
            return kept
        try:
            prompt = self.template.render(prompt_messages, add_generation_prompt=True) + self._header
        except TEMPLATE_ERRORS:
            return kept
        between = begin - len(prompt)
        return between if text.startswith(prompt) and 0 <= between <= len(piece) else kept

    def _require_ends(self, shape: Shape, plain: Sequence[Mapping[str, str]]) -> None:
        if self._why_no_spans:
            raise ConfigError(f"{self.name}: assistant spans cannot be found: {self._why_no_spans}",
                              hint="Write the end-of-turn token after the answer in the template.")
        last = shape.slots[-1] if shape.slots else None
        if last and last.message == len(plain) - 1 and plain[-1]["role"] == "assistant" and not last.ends:
            raise ConfigError(f"{self.name}: assistant spans cannot be found: the last answer is not followed by "
                              f"{' or '.join(self._stops)}; the end of a turn would never be learned",
                              hint="Write the end-of-turn token after the answer in the template.")

    def _segments(self, rendered: Rendered, cut: bool) -> list[Segment]:
        if not rendered.text:
            return []
        plain = [(start, end) for start, end in rendered.contents
                 if self.codec.holds_special(rendered.text[start:end])]
        if plain and not self.codec.can_cut:
            raise DataError(f"a message {SPELLS_SPECIAL}, and the tokenizer of {self.name} cannot keep it as text")
        cuts = {start for start, _ in rendered.spans} if cut else set()
        edges = sorted({0, len(rendered.text), *cuts, *(edge for span in plain for edge in span)})
        return [Segment(start, rendered.text[start:end], any(a <= start and end <= b for a, b in plain))
                for start, end in pairwise(edges)]


ROLES = frozenset({"system", "user", "assistant"})


def straddles(row: Encoded, spans: Sequence[Span]) -> bool:
    """Whether a token begins before a span and reaches into it."""
    return any(bool(((row.offsets[:, 0] < start) & (row.offsets[:, 1] > start)).any()) for start, _ in spans)


def _source(tokenizer: Any) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise ConfigError(f"“{tokenizer.name_or_path or 'this tokenizer'}” has no chat template",
                          hint="Put a chat_template.jinja beside its tokenizer.json; danlu.tokens.train.CHAT_TEMPLATE "
                               "is one to start from.")
    return source


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _borders(content: str) -> tuple[str, str]:
    """The white space before and after the content proper."""
    core = content.lstrip()
    lead = content[:len(content) - len(core)]
    return lead, core[len(core.rstrip()):]


def _sentinels(count: int, text: str) -> list[str]:
    """Words of letters that occur nowhere in the text and not in each other."""
    stem = "zqxj"
    while stem in text:
        stem += "qzxj"[len(stem) % 4]
    return [stem + "".join("abcdefghij"[int(digit)] for digit in f"{i:05d}") + "k" for i in range(count)]


def _end_of_turn(piece: str, trail: str, stops: Sequence[str]) -> tuple[int, bool]:
    """How many characters after a content end its turn: its own white space, the template's, a stop token.

    Where no stop token follows: the content's own white space, and False.
    """
    kept = len(trail) if piece.startswith(trail) else 0
    rest = piece[kept:].lstrip()
    found = max((stop for stop in stops if rest.startswith(stop)), key=len, default="")
    return (len(piece) - len(rest) + len(found), True) if found else (kept, False)


def _fill(shape: Shape, plain: Sequence[Mapping[str, str]], text: str) -> Rendered | None:
    """Puts the contents between the pieces; None unless that is the real rendering."""
    parts, spans, contents, at = [], [], [], 0
    for piece, slot in zip(shape.pieces, shape.slots):
        core = plain[slot.message]["content"].strip()
        parts += [piece, core]
        at += len(piece)
        contents.append((at, at + len(core)))
        if plain[slot.message]["role"] == "assistant":
            spans.append((at - slot.before, at + len(core) + slot.after))
        at += len(core)
    parts.append(shape.pieces[-1])
    return Rendered(text, spans, contents) if "".join(parts) == text else None
