"""Records to Examples: every token is learned exactly once, or the ledger says why not.

A document becomes [bos] + its tokens + [eos] (a tokenizer without bos begins with eos). One that is longer than
`cutoff_len` is cut into pieces, each later piece beginning with the last token of the one before as context. A dialogue
is rendered and tokenised once, and a token is learned if it lies in a learned span of the text: what the assistant says
and the token that ends its turn. The first token of an example is never learned, for nothing predicts it.

    encoder = Encoder(tokenizer, cutoff_len=512)
    encoder.check()
    for example in encoder.dialogues(dialogues, ledger): …

Stations of the ledger: `render` (dialogues: rows, bytes of what was said), `tokenize` (rows, bytes in and tokens out),
`overlong` (only the rows that are too long), `learn` (tokens in; out are the learned ones).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, Literal, TypeVar

import numpy as np

from danlu.core.errors import ConfigError, DataError
from danlu.core.examples import Branch, Example
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Document, Message, bytes_of
from danlu.tokens.chat import SPELLS_SPECIAL, Chat, Rendered, Span
from danlu.tokens.codec import Codec, Encoded

Overlong = Literal["turns", "tokens", "split", "drop", "error"]
Learn = Literal["assistant", "last", "all"]
BATCH_ROWS = 1024
BATCH_CHARACTERS = 4_000_000
T = TypeVar("T")


def pieces(tokens: np.ndarray, cutoff_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts a document's tokens into (tokens, weights) of at most `cutoff_len` tokens.

    A later piece begins with the last token of the one before, as context. Over all pieces every token but the first
    has weight 1 exactly once.
    """
    assert cutoff_len >= 2, "a piece holds context and something to learn"
    found = []
    for start in range(0, max(len(tokens) - 1, 1), cutoff_len - 1):
        piece = tokens[start:start + cutoff_len]
        weights = np.ones(len(piece), np.float32)
        weights[:1] = 0
        found.append((piece, weights))
    return found


def keep_turns(ends: Sequence[int], limit: int) -> int:
    """How many turns fit: `ends` are the token counts up to the end of each. 0 where not even the first does."""
    return sum(1 for end in ends if end <= limit)


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


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A tokenised dialogue: int32 and float32 [n], and the token count up to the end of each answer."""

    ids: np.ndarray
    weights: np.ndarray
    ends: list[int]


class Encoder:
    """Turns records into Examples with one tokenizer.

    cutoff_len  tokens of the longest example
    overlong    dialogues that are longer: `turns` keeps the first whole turns, `tokens` cuts at the limit, `split`
                makes further examples of the later turns (each with the system message), `drop` drops, `error` stops
    learn       `assistant`: every answer; `last`: the last one; `all`: every token
    """

    def __init__(self, tokenizer: Any, cutoff_len: int, overlong: Overlong = "turns", learn: Learn = "assistant"
                 ) -> None:
        if cutoff_len < 2:
            raise ConfigError(f"cutoff_len {cutoff_len} leaves no room to learn anything", hint="Use 2 or more.")
        self.tokenizer, self.cutoff_len, self.overlong, self.learn = tokenizer, cutoff_len, overlong, learn
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
        for batch in batches(documents, lambda document: len(document.text)):
            for document, ids in zip(batch, self.codec.encode_plain([document.text for document in batch])):
                yield from self._pieces(document, ids, first, last, ledger)

    def _ends_of_document(self) -> tuple[int, int]:
        last = self.tokenizer.eos_token_id
        if last is None:
            raise ConfigError(f"the tokenizer “{self.tokenizer.name_or_path}” has no end-of-sequence token",
                              hint="Set eos_token in its tokenizer_config.json.")
        first = self.tokenizer.bos_token_id
        return (last if first is None else first), last

    def _pieces(self, document: Document, ids: np.ndarray, first: int, last: int, ledger: Ledger) -> Iterator[Example]:
        size, count = len(document.text.encode()), len(ids)
        station = ledger.station("tokenize")
        station.take(rows=1, bytes=size)
        station.add("tokens of text", tokens=count)
        if count == 0:
            station.drop("empty document", rows=1, bytes=size)
            return
        tokens = np.concatenate([[first], ids, [last]]).astype(np.int32)
        station.add("bos and eos", tokens=2)
        station.give(rows=1, bytes=size, tokens=len(tokens))
        found = pieces(tokens, self.cutoff_len)
        if len(found) > 1:
            overlong = ledger.station("overlong")
            overlong.take(rows=1, tokens=len(tokens))
            overlong.add("last token of the piece before, as context", rows=len(found) - 1, tokens=len(found) - 1)
            overlong.give(rows=len(found), tokens=len(tokens) + len(found) - 1)
        for i, (piece, weights) in enumerate(found):
            name = document.id if i == 0 else f"{document.id}#{i + 1}"
            yield from self._learn(piece, weights, document, name, ledger, first_of_all=i == 0)

    # Dialogues ---------------------------------------------------------------------------------------------------

    def dialogue(self, dialogue: Dialogue, ledger: Ledger) -> list[Example]:
        """The examples of one dialogue: one, or none, or several with `overlong: split`."""
        return list(self.dialogues([dialogue], ledger))

    def dialogues(self, dialogues: Iterable[Dialogue], ledger: Ledger) -> Iterator[Example]:
        """The examples of many dialogues, in their order, tokenised in batches."""
        open_stations(ledger, ("render", "tokenize", "overlong", "learn"))
        for batch in batches(dialogues, lambda dialogue: sum(len(message.content) for message in dialogue.messages)):
            ready = [item for item in (self._render(dialogue, ledger) for dialogue in batch) if item is not None]
            encoded = self.chat.encode([rendered for _, rendered in ready])
            for (dialogue, rendered), row in zip(ready, encoded):
                yield from self._row(dialogue, self._weigh(rendered, row), ledger)

    def _render(self, dialogue: Dialogue, ledger: Ledger) -> tuple[Dialogue, Rendered] | None:
        """The dialogue up to its last answer, rendered; None where it has no answer or the template refuses it."""
        station = ledger.station("render")
        size = dialogue.num_bytes
        station.take(rows=1, bytes=size)
        answers = [i for i, message in enumerate(dialogue.messages) if message.role == "assistant"]
        if not answers:
            station.drop("no answer", rows=1, bytes=size)
            ledger.quarantine(dialogue.id, "no answer", _excerpt(dialogue))
            return None
        messages = dialogue.messages[:answers[-1] + 1]
        try:
            rendered = self.chat.render(messages)
        except ConfigError as error:
            raise ConfigError(str(error), where=dialogue.id) from None
        except DataError as error:
            station.drop("refused by the chat template", rows=1, bytes=size)
            ledger.quarantine(dialogue.id, error.message, _excerpt(dialogue))
            return None
        if self.chat.exposed(messages, rendered):
            station.drop(SPELLS_SPECIAL, rows=1, bytes=size)
            ledger.quarantine(dialogue.id, SPELLS_SPECIAL, _excerpt(dialogue))
            return None
        kept = bytes_of(messages)
        if len(messages) < len(dialogue.messages):
            station.drop("no answer follows", bytes=size - kept)
            dialogue = Dialogue(messages, dialogue.source, dialogue.id, dialogue.category)
        station.give(rows=1, bytes=kept)
        return dialogue, rendered

    def _weigh(self, rendered: Rendered, row: Encoded) -> Row:
        spans = rendered.spans
        if self.learn == "all":
            weights = np.ones(len(row.ids), np.float32)
        else:
            weights = weights_from_spans(row.offsets, spans[-1:] if self.learn == "last" else spans)
        weights[:1] = 0
        if len(row.ids) <= self.cutoff_len:
            return Row(row.ids, weights, [])
        return Row(row.ids, weights, [int(np.searchsorted(row.offsets[:, 0], end)) for _, end in spans])

    def _row(self, dialogue: Dialogue, row: Row, ledger: Ledger) -> Iterator[Example]:
        station = ledger.station("tokenize")
        size = dialogue.num_bytes
        station.take(rows=1, bytes=size)
        station.add("tokens of text", tokens=len(row.ids))
        station.give(rows=1, bytes=size, tokens=len(row.ids))
        rows = [row]
        if len(row.ids) > self.cutoff_len:
            rows = self._shorten(dialogue, row, ledger)
        for i, kept in enumerate(rows):
            name = dialogue.id if i == 0 else f"{dialogue.id}#{i + 1}"
            yield from self._learn(kept.ids, kept.weights, dialogue, name, ledger, first_of_all=True)

    def _shorten(self, dialogue: Dialogue, row: Row, ledger: Ledger) -> list[Row]:
        """What the policy makes of a dialogue that is too long."""
        station, count, limit = ledger.station("overlong"), len(row.ids), self.cutoff_len
        if self.overlong == "error":
            raise DataError(f"the dialogue has {count} tokens; cutoff_len is {limit}", where=dialogue.id,
                            hint="Raise cutoff_len or choose overlong: turns, tokens, split or drop.")
        station.take(rows=1, tokens=count)
        if self.overlong == "drop":
            station.drop("longer than cutoff_len", rows=1, tokens=count)
            return []
        if self.overlong == "tokens":
            station.drop("tokens beyond cutoff_len", tokens=count - limit)
            station.give(rows=1, tokens=limit)
            return [Row(row.ids[:limit], row.weights[:limit], [])]
        kept, lost = (self._first_turns if self.overlong == "turns" else self._all_turns)(dialogue, row.ends)
        if not kept:
            station.drop("no turn fits cutoff_len", rows=1, tokens=count)
            return []
        tokens = sum(len(part.ids) for part in kept)
        if lost:
            station.drop("turns beyond cutoff_len" if self.overlong == "turns" else "turns longer than cutoff_len",
                         tokens=lost)
        if len(kept) > 1:
            station.add("later turns in rows of their own", rows=len(kept) - 1)
        if tokens + lost > count:
            station.add("template and system message again", tokens=tokens + lost - count)
        elif tokens + lost < count:
            station.drop("template between turns", tokens=count - tokens - lost)
        station.give(rows=len(kept), tokens=tokens)
        return kept

    def _try(self, messages: Sequence[Message]) -> Row | None:
        """Messages as a row of their own, or None where they do not fit or the template refuses them."""
        try:
            rendered = self.chat.render(messages)
        except DataError:
            return None
        if self.chat.exposed(messages, rendered):
            return None
        row = self._weigh(rendered, self.chat.encode([rendered])[0])
        return row if len(row.ids) <= self.cutoff_len else None

    def _first_turns(self, dialogue: Dialogue, ends: Sequence[int]) -> tuple[list[Row], int]:
        """One row of the first turns, rendered anew, and how many tokens the others had."""
        head, turns = split_turns(dialogue.messages)
        for count in range(keep_turns(ends, self.cutoff_len), 0, -1):
            row = self._try([*head, *chain(*turns[:count])])
            if row is not None:
                return [row], ends[-1] - ends[count - 1]
        return [], 0

    def _all_turns(self, dialogue: Dialogue, ends: Sequence[int]) -> tuple[list[Row], int]:
        """Rows of as many whole turns as fit, and how many tokens those turns had that do not fit alone."""
        head, turns = split_turns(dialogue.messages)
        rows: list[Row] = []
        start = lost = 0
        while start < len(turns):
            best, end = None, start
            while end < len(turns) and (row := self._try([*head, *chain(*turns[start:end + 1])])) is not None:
                best, end = row, end + 1
            if best is None:
                lost += ends[start] - (ends[start - 1] if start else 0)
                end = start + 1
            else:
                rows.append(best)
            start = end
        return rows, lost

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


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages at the beginning, and the turns: what leads to an answer, and the answer."""
    at = 0
    while at < len(messages) and messages[at].role == "system":
        at += 1
    turns: list[list[Message]] = [[]]
    for message in messages[at:]:
        turns[-1].append(message)
        if message.role == "assistant":
            turns.append([])
    return list(messages[:at]), [turn for turn in turns if turn]


SELF_TEST = (Message("user", "What is 2 + 2?"), Message("assistant", "It is 4."), Message("user", "And 3 + 4?"),
             Message("assistant", "That makes 7, as\n\nyou know."))


def check_chat(chat: Chat, bos_id: int | None) -> None:
    """The self-test of a template and its tokenizer. Raises ConfigError naming what is wrong."""
    try:
        rendered = chat.render(SELF_TEST)
    except DataError as error:
        raise ConfigError(error.message) from None
    row = chat.encode([rendered])[0]
    weights = weights_from_spans(row.offsets, rendered.spans)
    if bos_id is not None and row.ids[:2].tolist() == [bos_id, bos_id]:
        raise ConfigError(f"{chat.name} begins with two BOS tokens", hint="Remove one from the template.")
    learned = row.ids[weights > 0]
    if len(learned) == 0 or int(learned[-1]) not in chat.stop_ids:
        raise ConfigError(f"{chat.name}: the last learned token does not end a turn, so generation would never stop")
    decoded = chat.codec.decode(row.ids)
    if "".join(decoded.split()) != "".join(rendered.text.split()):
        raise ConfigError(f"{chat.name}: the tokenizer loses text: {rendered.text!r} came back as {decoded!r}",
                          hint="The template may use words or special tokens that this vocabulary does not hold.")


def open_stations(ledger: Ledger, names: Sequence[str]) -> None:
    """Mentions the stations in the order of the road, whichever row comes first."""
    for name in names:
        ledger.station(name)


def _excerpt(dialogue: Dialogue) -> str:
    return " | ".join(f"{message.role}: {message.content}" for message in dialogue.messages)


def batches(items: Iterable[T], size: Any) -> Iterator[list[T]]:
    """Lists of at most BATCH_ROWS items and about BATCH_CHARACTERS characters."""
    source = iter(items)
    while batch := list(islice(source, 1)):
        total = size(batch[0])
        while total < BATCH_CHARACTERS and len(batch) < BATCH_ROWS and (more := list(islice(source, 1))):
            batch += more
            total += size(more[0])
        yield batch
