"""Records to Examples: every token is learned exactly once, or the ledger says why not.

A document becomes [bos] + its tokens + [eos] (a tokenizer without bos begins with eos). One that is longer than
`cutoff_len` is cut into pieces, each later piece beginning with the last token of the one before as context. A document's
own context is read, not learned, and tokenised by itself where the tokenizer can be cut, as generation reads it. A dialogue
is rendered and tokenised once, and a token is learned if it lies in a learned span of the text: what the assistant says
and the token that ends its turn. The first token of an example is never learned, for nothing predicts it.

    encoder = Encoder(tokenizer, cutoff_len=512)
    encoder.check()
    for example in encoder.dialogues(dialogues, ledger): …

Stations of the ledger: `render` (dialogues: rows, bytes of what was said), `tokenize` (rows, bytes in and tokens out),
`overlong` (only the rows that are too long), `learn` (tokens in; out are the learned ones).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np

from danlu.core.errors import ConfigError, DataError
from danlu.core.examples import Branch, Example
from danlu.core.ledger import Ledger, Station
from danlu.core.records import Dialogue, Document, Message, bytes_of
from danlu.tokens.chat import SPELLS_SPECIAL, Chat, Rendered, Span, reason_of
from danlu.tokens.codec import Codec, Encoded, Segment, spread
from danlu.tokens.limits import Limits, Overlong, Row, Side, TruncationMode, keep_turns, split_turns

__all__ = ["Encoder", "Learn", "RewrittenHistory", "batches", "check_chat", "keep_turns", "open_stations", "pieces",
           "split_turns", "weights_from_spans"]

Learn = Literal["assistant", "last", "all"]
RewrittenHistory = Literal["per_turn", "error"]
NO_WEIGHT = "no answer has a weight"  # said so by the data: counted, not quarantined
REWEIGHTED = "an earlier answer has a weight, and the template rewrites it"  # with learn: all
BATCH_ROWS = 1024
BATCH_CHARACTERS = 1_000_000
T = TypeVar("T")


def pieces(tokens: np.ndarray, cutoff_len: int, weights: np.ndarray | None = None
           ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts a document's tokens into (tokens, weights) of at most `cutoff_len` tokens.

    A later piece begins with the last token of the one before, as context. Over all pieces every token but the first
    has its weight, by default 1, exactly once.
    """
    assert cutoff_len >= 2, "a piece holds context and something to learn"
    found = []
    for start in range(0, max(len(tokens) - 1, 1), cutoff_len - 1):
        piece = tokens[start:start + cutoff_len]
        own = np.ones(len(piece), np.float32) if weights is None else weights[start:start + cutoff_len].astype(np.float32)
        own[:1] = 0
        found.append((piece, own))
    return found


def weights_from_spans(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """float32 [n]: 1 for each token whose characters touch a learned span, and for empty tokens inside one.

    offsets  int [n, 2], start and end of each token;  spans  sorted and disjoint

    A token that begins in an answer and reaches beyond it is learned, so no character of an answer is lost. One that
    begins before an answer exists only where a tokenizer cannot be cut there (see `Chat.encode`).
    """
    weights = np.zeros(len(offsets), np.float32)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        weights[((starts < end) & (ends > start)) | ((starts == ends) & (starts >= start) & (starts < end))] = 1
    return weights


@dataclass(frozen=True, slots=True)
class Ready:
    """A rendered dialogue, which ends with an answer; `last_only`: nothing else of it is learned."""

    dialogue: Dialogue
    rendered: Rendered
    last_only: bool


@dataclass(frozen=True, slots=True)
class _Reader:
    """Encodes documents, given as (context, text); may be sent to another process."""

    codec: Codec

    def read(self, rows: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(ids, weights) of each; weights where there is a context, whose own are 0."""
        plain = iter(self.codec.encode_plain([text for context, text in rows if not context]))
        behind = iter(self._behind_context([row for row in rows if row[0]]))
        return [next(behind) if context else (next(plain), None) for context, _ in rows]

    def _behind_context(self, rows: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        parts = []
        for context, text in rows:
            whole = [Segment(0, context + text, plain=True)]
            parts.append([Segment(0, context, plain=True), Segment(len(context), text, plain=True)]
                         if self.codec.can_cut else whole)
        spans = [(len(context), len(context) + len(text)) for context, text in rows]
        return [(row.ids, weights_from_spans(row.offsets, [span]))
                for row, span in zip(self.codec.encode(parts), spans, strict=True)]


def _rows(documents: Sequence[Document]) -> list[tuple[str, str]]:
    return [(document.context, document.text) for document in documents]


class Encoder:
    """Turns records into Examples with one tokenizer.

    cutoff_len         tokens of the longest example
    overlong           what happens to dialogues that are longer (`danlu.tokens.limits`), and from which end
                       (`truncation_mode`); what leads to an answer, and an answer, may have limits of their own
    learn              `assistant`: every answer; `last`: the last one; `all`: every token. Each answer counts as its
                       message's weight says, 1 where that says nothing
    rewritten_history  dialogues whose earlier answers the template writes otherwise than they were said (it strips what
                       was thought, say): `per_turn` makes an example of every answer, as it was given; `error` stops
    """

    def __init__(self, tokenizer: Any, cutoff_len: int, overlong: Overlong = "turns", learn: Learn = "assistant", *,
                 truncation_mode: TruncationMode = "keep_start", max_source_length: int | None = None,
                 max_target_length: int | None = None, rewritten_history: RewrittenHistory = "per_turn",
                 workers: int = 1) -> None:
        if cutoff_len < 2:
            raise ConfigError(f"cutoff_len {cutoff_len} leaves no room to learn anything", hint="Use 2 or more.")
        self.tokenizer, self.cutoff_len, self.learn = tokenizer, cutoff_len, learn
        self.limits = Limits(cutoff_len, overlong, truncation_mode, max_source_length, max_target_length)
        self.rewritten_history, self.workers = rewritten_history, workers
        self.codec = Codec(tokenizer)

    @cached_property
    def chat(self) -> Chat:
        """The chat template, opened at its first use: documents need none."""
        return Chat(self.tokenizer, codec=self.codec)

    def check(self, dialogues: bool = True) -> None:
        """Tries the tokenizer and its template on a dialogue. Raises ConfigError where training would go wrong."""
        self._ends_of_document()
        if dialogues:
            check_chat(self.chat, self.tokenizer.bos_token_id)

    # Documents ---------------------------------------------------------------------------------------------------

    def document(self, document: Document, ledger: Ledger) -> list[Example]:
        """The examples of one document."""
        return list(self.documents([document], ledger))

    def documents(self, documents: Iterable[Document], ledger: Ledger) -> Iterator[Example]:
        """The examples of many documents, in their order, tokenised in batches."""
        first, last = self._ends_of_document()
        open_stations(ledger, ("tokenize", "overlong", "learn"))
        found = batches(documents, lambda document: len(document.context) + len(document.text))
        for batch, encoded in spread(_Reader(self.codec).read, found, _rows, self.workers):
            for document, (ids, weights) in zip(batch, encoded, strict=True):
                yield from self._pieces(document, ids, weights, first, last, ledger)

    def _ends_of_document(self) -> tuple[int, int]:
        last = self.tokenizer.eos_token_id
        if last is None:
            raise ConfigError(f"the tokenizer “{self.tokenizer.name_or_path}” has no end-of-sequence token",
                              hint="Set eos_token in its tokenizer_config.json.")
        first = self.tokenizer.bos_token_id
        return (last if first is None else first), last

    def _pieces(self, document: Document, ids: np.ndarray, weights: np.ndarray | None, first: int, last: int,
                ledger: Ledger) -> Iterator[Example]:
        """The pieces of a document of these ids; `weights` where not all of them are learned."""
        size, count = document.num_bytes, len(ids)
        station = ledger.station("tokenize")
        station.take(rows=1, bytes=size)
        station.add("tokens of text", tokens=count)
        if count == 0:
            station.drop("empty document", rows=1, bytes=size)
            return
        tokens = np.concatenate([[first], ids, [last]]).astype(np.int32)
        station.add("bos and eos", tokens=2)
        station.give(rows=1, bytes=size, tokens=len(tokens))
        found = pieces(tokens, self.cutoff_len, None if weights is None else np.concatenate([[0], weights, [1]]))
        if len(found) > 1:
            overlong = ledger.station("overlong")
            overlong.take(rows=1, tokens=len(tokens))
            overlong.add("last token of the piece before, as context", rows=len(found) - 1, tokens=len(found) - 1)
            overlong.give(rows=len(found), tokens=len(tokens) + len(found) - 1)
        for i, (piece, own) in enumerate(found):
            name = document.id if i == 0 else f"{document.id}#{i + 1}"
            yield from self._learn(piece, own, document, name, ledger, first_of_all=i == 0)

    # Dialogues ---------------------------------------------------------------------------------------------------

    def dialogue(self, dialogue: Dialogue, ledger: Ledger) -> list[Example]:
        """The examples of one dialogue: one, or none, or several with `overlong: split`."""
        return list(self.dialogues([dialogue], ledger))

    def dialogues(self, dialogues: Iterable[Dialogue], ledger: Ledger) -> Iterator[Example]:
        """The examples of many dialogues, in their order, tokenised in batches."""
        open_stations(ledger, ("render", "tokenize", "overlong", "learn"))
        for batch in batches(dialogues, lambda dialogue: sum(len(message.content) for message in dialogue.messages)):
            ready = [item for dialogue in batch for item in self._enter(dialogue, ledger)]
            encoded = self.chat.encode([item.rendered for item in ready])
            for item, row in zip(ready, encoded):
                yield from self._row(item.dialogue, self._weigh(item, row), ledger)

    def _enter(self, dialogue: Dialogue, ledger: Ledger) -> list[Ready]:
        """The dialogue up to its last answer, rendered; nothing where it has no answer or the template refuses it."""
        station, size = ledger.station("render"), dialogue.num_bytes
        station.take(rows=1, bytes=size)
        messages = tuple(normal(message) for message in dialogue.messages)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            return self._refuse(dialogue, "no answer", "no answer", ledger)
        dialogue = replace(dialogue, messages=messages[:answers[-1] + 1])
        try:
            ready = self._ready(dialogue)
        except ConfigError as error:
            raise ConfigError(error.message, where=dialogue.id, hint=error.hint) from None
        except DataError as error:
            return self._refuse(replace(dialogue, messages=messages), reason_of(error), error.message, ledger)
        if self.rewritten_history == "error" and any(item.rendered.rewritten and not item.last_only for item in ready):
            raise DataError(f"{self.chat.name} writes earlier answers otherwise than they were said", where=dialogue.id,
                            hint="rewritten_history: per_turn makes an example of every answer.")
        if self.learn == "all" and any(item.rendered.rewritten for item in ready) and any(
                messages[place].weight not in (None, 1) or messages[place].spans for place in answers[:-1]):
            return self._refuse(replace(dialogue, messages=messages), REWEIGHTED, REWEIGHTED, ledger)
        asked = 1
        if self.learn == "assistant" and any(item.rendered.rewritten for item in ready):
            asked = sum(message.role == "assistant" and message.weight != 0 for message in dialogue.messages)
            ready = self._per_turn(dialogue, ledger)
        kept = bytes_of(dialogue.messages)
        if size > kept:
            station.drop("no answer follows", bytes=size - kept)
        self._count_rows(ready, asked, kept, station)
        return ready

    def _count_rows(self, ready: Sequence[Ready], asked: int, size: int, station: Station) -> None:
        """One dialogue of `size` bytes came in, examples of `asked` answers were wanted, and these were made."""
        given = sum(item.dialogue.num_bytes for item in ready)
        if asked > 1:
            station.add("answers in rows of their own", rows=asked - 1)
        if len(ready) < asked:
            station.drop("answers that the chat template refuses alone", rows=asked - len(ready))
        elif asked == 0:
            station.drop(NO_WEIGHT, rows=1)
        if given > size:
            station.add("earlier turns again", bytes=given - size)
        elif given < size:
            station.drop("answers that are not learned", bytes=size - given)
        station.give(rows=len(ready), bytes=given)

    def _ready(self, dialogue: Dialogue, last_only: bool = False) -> list[Ready]:
        """The dialogue rendered. Raises DataError where the template refuses it or a message would become a token."""
        rendered = self.chat.render(dialogue.messages, tools=dialogue.tools)
        if self.chat.exposed(dialogue.messages, rendered):
            raise DataError(SPELLS_SPECIAL)
        for number, message in enumerate(dialogue.messages):
            said, at = message.content.rstrip(), _begin(rendered, number, message)
            if message.spans and (at is None or rendered.text[at:at + len(said)] != said):
                raise DataError(f"{self.chat.name} rewrites an answer of which parts have weights")
        return [Ready(dialogue, rendered, last_only or self.learn == "last")]

    def _per_turn(self, dialogue: Dialogue, ledger: Ledger) -> list[Ready]:
        """Every answer that is learned at the end of a dialogue of its own, as it was given."""
        ready: list[Ready] = []
        for number, message in enumerate(dialogue.messages):
            if message.role != "assistant" or message.weight == 0:
                continue
            name = f"{dialogue.id}#{len(ready) + 1}" if ready else dialogue.id
            part = replace(dialogue, messages=dialogue.messages[:number + 1], id=name)
            try:
                ready += self._ready(part, last_only=True)
            except DataError as error:
                ledger.quarantine(dialogue.id, error.message, _excerpt(part))
        return ready

    def _refuse(self, dialogue: Dialogue, reason: str, message: str, ledger: Ledger) -> list[Ready]:
        ledger.station("render").drop(reason, rows=1, bytes=dialogue.num_bytes)
        ledger.quarantine(dialogue.id, message, _excerpt(dialogue))
        return []

    def _weigh(self, item: Ready, row: Encoded) -> Row:
        """The row with each answer's weight on the tokens of its span."""
        rendered, spans = item.rendered, item.rendered.spans
        answers = [(i, message) for i, message in enumerate(item.dialogue.messages) if message.role == "assistant"]
        last_only = item.last_only or rendered.rewritten
        if last_only:
            spans, answers = spans[-1:], answers[-1:]
        weights = np.full(len(row.ids), float(self.learn == "all"), np.float32)
        for span, (number, message) in zip(spans, answers, strict=True):
            if message.weight is not None or self.learn != "all":
                weight = 1.0 if message.weight is None else message.weight
                weights = np.where(weights_from_spans(row.offsets, [span]) > 0, np.float32(weight), weights)
            at, begins = _begin(rendered, number, message) or 0, row.offsets[:, 0]
            for start, end, weight in message.spans:  # a token belongs to the part in which it begins
                weights = np.where((begins >= at + start) & (begins < at + end), np.float32(weight), weights)
        weights[:1] = 0
        return Row(row.ids, weights, self._sides(item, row, spans), last_only)

    def _sides(self, item: Ready, row: Encoded, spans: Sequence[Span]) -> tuple[Side, ...]:
        """Where the turns lie in tokens; only looked for where a limit may be exceeded."""
        limits = self.limits
        if len(row.ids) <= min(limit for limit in (limits.cutoff_len, limits.max_source_length, limits.max_target_length)
                               if limit is not None):
            return ()
        starts = row.offsets[:, 0]
        messages, contents = item.dialogue.messages, item.rendered.contents
        answers = {start for i, places in contents.items() if messages[i].role == "assistant" for start, _ in places}
        said = sorted(place for places in contents.values() for place in places if place[0] not in answers)
        sides, at = [], 0
        for begin, end in spans:
            first, last = int(np.searchsorted(starts, begin)), int(np.searchsorted(starts, end))
            own = [(int(np.searchsorted(starts, a)), int(np.searchsorted(starts, b))) for a, b in said if b <= begin]
            own = [place for place in own if place[0] >= at]
            sides.append(Side(at, first, last, tuple(sorted(own, key=lambda place: place[0] - place[1]))))
            at = last
        return tuple(sides)

    def _row(self, dialogue: Dialogue, row: Row, ledger: Ledger) -> Iterator[Example]:
        station = ledger.station("tokenize")
        size = dialogue.num_bytes
        station.take(rows=1, bytes=size)
        station.add("tokens of text", tokens=len(row.ids))
        station.give(rows=1, bytes=size, tokens=len(row.ids))
        rows = [row]
        if self.limits.exceeded(row):
            def again(messages: Sequence[Message]) -> Row | None:
                return self._again(replace(dialogue, messages=tuple(messages)), row.last_only)

            rows = self.limits.shorten(dialogue.messages, row, again, dialogue.id, ledger.station("overlong"))
        for i, kept in enumerate(rows):
            name = dialogue.id if i == 0 else f"{dialogue.id}#{i + 1}"
            yield from self._learn(kept.ids, kept.weights, dialogue, name, ledger, first_of_all=True)

    def _again(self, dialogue: Dialogue, last_only: bool) -> Row | None:
        """Some of the turns as a row of their own, or None where the template refuses them."""
        try:
            [item] = self._ready(dialogue, last_only)
        except DataError:
            return None
        if item.rendered.rewritten and not item.last_only:
            return None
        return self._weigh(item, self.chat.encode([item.rendered])[0])

    def _learn(self, ids: np.ndarray, weights: np.ndarray, record: Document | Dialogue, name: str, ledger: Ledger,
               first_of_all: bool) -> Iterator[Example]:
        """The example, where it holds something to learn."""
        station, count = ledger.station("learn"), len(ids)
        learned = int(np.count_nonzero(weights))
        station.take(rows=1, tokens=count)
        if learned == 0:
            station.drop("nothing to learn", rows=1, tokens=count)
            return
        station.drop("first token" if first_of_all else "context", tokens=1)
        if count - learned > 1:
            station.drop("context", tokens=count - learned - 1)
        station.give(rows=1, tokens=learned)
        yield Example(np.zeros(0, np.int32), (Branch(ids, weights),), record.source, record.category, name)


def _begin(rendered: Rendered, number: int, message: Message) -> int | None:
    """Where the content of a message begins in the text, as far as that is known; thinking stands before it."""
    places = rendered.contents.get(number)
    return None if not places else places[-1][1] - len(message.content.rstrip())


def normal(message: Message) -> Message:
    """The message with its role in small letters."""
    role = message.role.strip().lower()
    return message if role == message.role else replace(message, role=role)


SELF_TEST = (Message("user", "What is 2 + 2?"), Message("assistant", "It is 4."), Message("user", "And 3 + 4?"),
             Message("assistant", "That makes 7, as\n\nyou know."))


def check_chat(chat: Chat, bos_id: int | None) -> None:
    """The self-test of a template and its tokenizer, on one exchange and on two. Raises ConfigError naming what is wrong.

    No BOS beyond those that the template writes; the last learned token stops generation; the ids of a prompt are the
    first ids of the training row; and the ids decode to the text.
    """
    for messages in (SELF_TEST[:2], SELF_TEST):
        try:
            rendered = chat.render(messages)
            prompt = chat.prompt_ids(messages[:-1])
        except DataError as error:
            raise ConfigError(error.message, hint="Choose a template by `template:`.") from None
        row = chat.encode([rendered])[0]
        weights = weights_from_spans(row.offsets, rendered.spans)
        if bos_id is not None and row.ids[:2].tolist() == [bos_id, bos_id]:
            raise ConfigError(f"{chat.name} begins with two BOS tokens", hint="Remove one from the template.")
        bos = None if bos_id is None else chat.codec.special.id_to_token(bos_id)
        if bos is not None and row.ids.tolist().count(bos_id) != rendered.text.count(bos):
            raise ConfigError(f"{chat.name}: the row has other BOS tokens than the template writes")
        learned = row.ids[weights > 0]
        if len(learned) == 0 or int(learned[-1]) not in chat.stop_ids:
            raise ConfigError(f"{chat.name}: the last learned token does not end a turn, so generation would never stop")
        decoded = chat.codec.decode(row.ids)
        if "".join(decoded.split()) != "".join(rendered.text.split()):
            raise ConfigError(f"{chat.name}: the tokenizer loses text: {rendered.text!r} came back as {decoded!r}",
                              hint="The template may use words or special tokens that this vocabulary does not hold.")
        if row.ids[:len(prompt)].tolist() != prompt:
            raise ConfigError(f"{chat.name}: the prompt that a model gets is tokenised otherwise than the same text in a "
                              f"training row: {chat.codec.decode(prompt)!r}",
                              hint="Its last word runs into the answer; end the prompt with a line end or a special token.")


def open_stations(ledger: Ledger, names: Sequence[str]) -> None:
    """Mentions the stations in the order of the road, whichever row comes first."""
    for name in names:
        ledger.station(name)


def _excerpt(dialogue: Dialogue) -> str:
    return " | ".join(f"{message.role}: {message.content or message.thinking}" for message in dialogue.messages)


def batches(items: Iterable[T], size: Any) -> Iterator[list[T]]:
    """Lists of at most BATCH_ROWS items and about BATCH_CHARACTERS characters."""
    source = iter(items)
    while batch := list(islice(source, 1)):
        total = size(batch[0])
        while total < BATCH_CHARACTERS and len(batch) < BATCH_ROWS and (more := list(islice(source, 1))):
            batch += more
            total += size(more[0])
        yield batch
