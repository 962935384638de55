"""A vocabulary that grows: new pieces are reached by the tokenizer's own algorithm, never by a list of added tokens.

Byte-level BPE gets merges behind all old ones, from the bytes up to each piece. SentencePiece BPE gets pieces whose scores
are below all old ones, in `tokenizer.json` with the merges that say the same. So every old merge goes first, and a text is
cut as before, except that old tokens in a row that spell a new piece become one. A unigram piece gets the score of the best
way to spell it and a little more (`GAIN`), with the same effect unless another cut of the word was nearly as good.

A piece needs parts: a merge joins two tokens. Parts that are wanted themselves are taken first, then whole characters, then
halves; those that nobody asked for are intermediate tokens and get ids like the others. New ids begin behind all old ones.

    growth = grow(backend, ["你好", "人工智能"], first_id=49152)
    growth.write(source_folder, new_folder)
"""

import json
import math
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.tokens import sp_model
from danlu.tokens.sp_train import SCORES
from danlu.tokens.spelling import INSIDE, Spelling

# Nats by which a unigram piece beats the parts that spell it, at least; the first piece by twice as much, those between in
# the order of the pieces, so that of two ways to cut a word the one with the earlier piece wins; rounded up like the scores
# of a vocabulary trained here (`sp_train`), so that tokenizer.json and tokenizer.model agree.
GAIN = 0.05
MAX_PIECE_LENGTH = 32  # characters; parts are chosen by a search whose time grows with the cube
INTERMEDIATE, RAGGED, TAKEN = 1, 10, 10_000  # costs of a part that nobody asked for
KEPT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token of the grown vocabulary.

    token   as the vocabulary writes it
    parts   the old ids that spelled it under the old tokenizer
    wanted  whether it was asked for; else an intermediate token
    """

    id: int
    token: str
    parts: tuple[int, ...]
    wanted: bool


@dataclass(frozen=True, slots=True)
class Growth:
    """What came of growing.

    backend   the grown tokenizer
    old       the tokenizer as it was, or (mode replace) what of it was kept
    tokens    the new tokens in the order of their ids, which begin at first_id
    refused   (number of the piece, why it was not taken)
    unreached new pieces that the whole tokenizer does not give when it reads them alone: there should be none
    kept      mode replace: the old id of each id before first_id; None where all ids stay
    """

    backend: Tokenizer
    old: Spelling
    first_id: int
    tokens: list[NewToken]
    refused: list[tuple[int, str]]
    unreached: list[str]
    num_merges: int
    kept: tuple[int, ...] | None = None

    @property
    def num_ids(self) -> int:
        """One more than the highest id."""
        return self.first_id + len(self.tokens)

    def sources(self) -> list[tuple[int, ...]]:
        """The old ids behind each new row: of merged vocabularies from first_id on, of replaced ones from 0 on."""
        kept = [] if self.kept is None else [(old,) for old in self.kept]
        return kept + [token.parts for token in self.tokens]

    def write(self, source: Path, folder: Path) -> None:
        """Writes the tokenizer's files: tokenizer.json, those beside it, and the kinds of vocabulary file it had."""
        folder.mkdir(parents=True, exist_ok=True)
        spec = json.loads(self.backend.to_str())
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        for name in KEPT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if self.kept is not None:
            self._renumber(folder)
        if (source / "merges.txt").is_file() and spec["model"]["type"] == "BPE":
            merges = "".join(f"{left} {right}\n" for left, right in spec["model"]["merges"])
            (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
            (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
        for name in ("tokenizer.model", "spiece.model"):
            if (source / name).is_file():
                (folder / name).write_bytes(self._sentencepiece((source / name).read_bytes(), str(source / name)))

    def _renumber(self, folder: Path) -> None:
        """Gives added tokens their new ids in the files that older programs read them from."""
        ids = {token.content: id for id, token in self.backend.get_added_tokens_decoder().items()}
        for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", None)):
            if not (folder / name).is_file():
                continue
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            if key is None:
                values = {content: ids[content] for content in values if content in ids}
            elif key in values:
                entries = [entry for entry in values[key].values() if entry["content"] in ids]
                values[key] = {str(ids[entry["content"]]): entry for entry in entries}
            (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def _sentencepiece(self, data: bytes, where: str) -> bytes:
        """The old `tokenizer.model` with the same new ids. Raises ConfigError where its ids are not tokenizer.json's."""
        data = data if self.kept is None else sp_model.keep_pieces(data, self.kept)
        pieces = sp_model.read_pieces(data)
        names = {id: token for token, id in self.old.vocabulary.items()}
        for id, piece in enumerate(pieces):
            if piece.type == sp_model.NORMAL and names.get(id) != piece.text:
                raise ConfigError(f"says that token {id} is “{piece.text}”; tokenizer.json says “{names.get(id)}”",
                                  where=where, hint="Take away the file that is not this model's.")
        # What the file does not have (added tokens, ids without a token) keeps the ids of both files the same.
        filled = [sp_model.Piece(names.get(id, _filler(id)), 0.0, sp_model.UNUSED)
                  for id in range(len(pieces), self.first_id)]
        normal = [piece.score for piece in pieces if piece.type == sp_model.NORMAL]
        if self.old.kind == "unigram":
            scores = [float(score) for _, score in json.loads(self.backend.to_str())["model"]["vocab"][self.first_id:]]
        else:
            scores = _falling(min(normal, default=0.0), len(self.tokens))
        grown = [sp_model.Piece(token.token, score) for token, score in zip(self.tokens, scores, strict=True)]
        return sp_model.append_pieces(data, [*filled, *grown])


def grow(backend: Tokenizer, pieces: Sequence[str], first_id: int, *, num_pieces: int | None = None,
         max_length: int = MAX_PIECE_LENGTH, replace: bool = False, keep: Collection[int] = ()) -> Growth:
    """Adds pieces to a tokenizer, the first ones first, at most `num_pieces` of them and what they need.

    first_id  the first new id: above all ids of the tokenizer, and of rows that something else uses
    replace   all tokens but special ones, bytes, single characters and `keep` are taken out first; ids are given anew

    A piece that cannot be taken is in `refused` with its reason. Raises ConfigError for an unknown kind of tokenizer.
    """
    asked = Spelling(backend)
    kept = None
    if replace:
        kept = kept_ids(asked, keep)
        backend = stripped(asked, kept)
        first_id = len(kept)
    spelling = Spelling(backend)
    assert first_id > max(spelling.vocabulary.values()), "new ids come after all old ones"
    chosen, refused = _choose(spelling, pieces, num_pieces, max_length)
    ordered = sorted(chosen, key=lambda item: len(item[1])) if spelling.kind == "unigram" else chosen
    wanted = [token for _, token in chosen]
    growing = _Unigram(spelling, wanted) if spelling.kind == "unigram" else _Bpe(spelling, set(wanted))
    taken = set()
    for number, token in ordered:
        reason = growing.add(token)
        if reason is None:
            taken.add(token)
        else:
            refused.append((number, reason))
    tokens = [NewToken(first_id + offset, token, tuple(_ids_of(asked.backend, token) if replace else parts), token in taken)
              for offset, (token, parts) in enumerate(growing.parts.items())]
    spec = _grown_spec(spelling, tokens, growing, first_id)
    grown = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    unreached = _unreached(grown, spelling, [token for token in tokens if token.wanted])
    return Growth(grown, spelling, first_id, tokens, sorted(refused), unreached, growing.num_merges, kept)


def _choose(spelling: Spelling, pieces: Sequence[str], num_pieces: int | None,
            max_length: int) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(number, token) of the pieces that can be taken, and (number, reason) of the others."""
    chosen: dict[str, int] = {}
    refused = []
    for number, piece in enumerate(pieces):
        reason = spelling.why_not(piece)
        token = spelling.token(piece.replace("▁", " "))
        if reason is None and len(piece) > max_length:
            reason = "too long"
        elif reason is None and token in chosen:
            reason = "repeated"
        elif reason is None and num_pieces is not None and len(chosen) >= num_pieces:
            reason = "beyond num_pieces"
        if reason is None:
            chosen[token] = number
        else:
            refused.append((number, reason))
    return [(number, token) for token, number in chosen.items()], refused


class _Bpe:
    """New tokens of a BPE model. `parts` holds them in the order of their ids, which is the order of their merges.

    Byte-level: a merge is a pair. SentencePiece joins whatever two neighbours spell a piece, so there its text decides.
    """

    def __init__(self, spelling: Spelling, wanted: set[str]) -> None:
        self.spelling, self.wanted = spelling, wanted
        self.bytes = spelling.kind == "bytes"
        self.parts: dict[str, tuple[int, ...]] = {}
        self.ranks: dict[Any, int] = {}

    @property
    def num_merges(self) -> int:
        """Merges that were added; of SentencePiece kinds those that tokenizer.json needs are more."""
        return len(self.ranks)

    def add(self, token: str) -> str | None:
        """Makes a token reachable with the merges and intermediate tokens that it needs; why not, where it cannot be."""
        before = len(self.parts), len(self.ranks)
        row = self._start(token)
        if row is None:
            self._undo(*before)
            return "the tokenizer has no bytes for it"
        row = self._reduce(row)
        while len(row) > 1:
            at = self._pair(row, token)
            if at is None:
                self._undo(*before)
                return "a part of it is an old token that no merge reaches"
            left, right = row[at], row[at + 1]
            if left + right not in self.parts:
                self.parts[left + right] = self._old(left) + self._old(right)
            self.ranks[self._key(left, right)] = len(self.ranks)
            row = self._reduce(row)
        return None

    def _undo(self, num_parts: int, num_ranks: int) -> None:
        while len(self.parts) > num_parts:
            self.parts.popitem()
        while len(self.ranks) > num_ranks:
            self.ranks.popitem()

    def _key(self, left: str, right: str) -> Any:
        return (left, right) if self.bytes else left + right

    def _old(self, token: str) -> tuple[int, ...]:
        return self.parts[token] if token in self.parts else (self.spelling.vocabulary[token],)

    def _start(self, token: str) -> list[str] | None:
        """The old tokens that spell it; characters that the vocabulary has not become tokens themselves."""
        model, known = self.spelling.backend.model, self.spelling.vocabulary
        if self.bytes:
            row = [piece.value for piece in model.tokenize(token)]
            return row if "".join(row) == token else None
        row, run = [], ""
        for character in token:
            if character in known:
                run += character
                continue
            row += [piece.value for piece in model.tokenize(run)] if run else []
            run = ""
            row.append(character)
            if character not in self.parts:
                parts = _ids_of(self.spelling.backend, character)
                if not parts:
                    return None
                self.parts[character] = tuple(parts)
        return row + ([piece.value for piece in model.tokenize(run)] if run else [])

    def _reduce(self, row: list[str]) -> list[str]:
        """Applies the new merges, the first ones first and from the left; the old ones have been applied."""
        row = list(row)
        while True:
            found = [(self.ranks[key], at) for at in range(len(row) - 1)
                     if (key := self._key(row[at], row[at + 1])) in self.ranks]
            if not found:
                return row
            _, at = min(found)
            row[at:at + 2] = [row[at] + row[at + 1]]

    def _pair(self, row: list[str], token: str) -> int | None:
        """Where the next two parts are joined: inside one character, else as the cheapest tree of joins begins."""
        ends = [0]
        for part in row:
            ends.append(ends[-1] + len(part))
        # Whether a character begins at each place.
        begins = [not self.bytes or letter not in INSIDE for letter in token] + [True]
        for at in range(len(row) - 1):
            inside = not any(begins[ends[at] + 1:ends[at + 2]])
            whole = begins[ends[at]] and begins[ends[at + 2]] and not any(begins[ends[at] + 1:ends[at + 2]])
            if (inside or whole) and row[at] + row[at + 1] not in self.spelling.vocabulary:
                return at
        return _first_join(len(row), lambda i, j: self._cost(token[ends[i]:ends[j]], begins[ends[i]] and begins[ends[j]],
                                                             token))

    def _cost(self, part: str, whole: bool, token: str) -> int:
        if part in self.spelling.vocabulary:
            return TAKEN
        if part == token or part in self.wanted or part in self.parts:
            return 0
        return INTERMEDIATE if whole else RAGGED


def _first_join(count: int, cost: Any) -> int | None:
    """The first join of the binary tree over parts 0 … count whose nodes cost least; None where it cannot be had.

    Of trees that cost the same the most balanced one: its nodes are shorter, so that more words share them.
    """
    best: dict[tuple[int, int], tuple[int, int]] = {}  # span to (cost, where it is split)
    for size in range(2, count + 1):
        for begin in range(count - size + 1):
            end = begin + size
            splits = [(best.get((begin, cut), (0, 0))[0] + best.get((cut, end), (0, 0))[0], abs(2 * cut - begin - end), cut)
                      for cut in range(begin + 1, end)]
            total, _, cut = min(splits)
            best[begin, end] = (total + cost(begin, end), cut)
    if best[0, count][0] >= TAKEN:
        return None
    begin, end = 0, count
    while end - begin > 2:
        cut = best[begin, end][1]
        begin, end = (begin, cut) if cut - begin > 1 else (cut, end)
    return begin


class _Unigram:
    """New tokens of a unigram model, which must come shorter ones first: each beats all ways to spell it so far."""

    num_merges = 0

    def __init__(self, spelling: Spelling, wanted: list[str]) -> None:
        self.spelling = spelling
        self.parts: dict[str, tuple[int, ...]] = {}
        self.gains = {token: GAIN * (2 - rank / len(wanted)) for rank, token in enumerate(wanted)}
        vocabulary = [(str(token), float(score)) for token, score in spelling.spec["model"]["vocab"]]
        special = {*spelling.added}
        self.scores = {token: score for token, score in vocabulary if token not in special}
        self.lowest = min(self.scores.values())
        self.longest = max(map(len, self.scores))
        self.closed = spelling.spec["model"].get("unk_id") is None  # nothing stands for characters that are not there
        self.new: dict[str, float] = {}

    def add(self, token: str) -> str | None:
        """Gives a token its score; characters that the vocabulary has not become tokens with its lowest score."""
        foreign = [character for character in token if character not in self.scores]
        if foreign and self.closed:
            return "the tokenizer has no token for a character that it does not know"
        for character in foreign:
            if character not in self.scores:
                self._put(character, self.lowest)
        if token not in self.scores:
            self._put(token, math.ceil((self._best(token) + self.gains[token]) * SCORES) / SCORES)
        return None

    def _put(self, token: str, score: float) -> None:
        self.parts[token] = tuple(_ids_of(self.spelling.backend, token))
        self.scores[token] = self.new[token] = score
        self.longest = max(self.longest, len(token))

    def _best(self, token: str) -> float:
        """The highest sum of scores over all ways to spell the token (Kudo 2018, equation 5; Viterbi)."""
        best = [0.0] + [-np.inf] * len(token)
        for end in range(1, len(token) + 1):
            for begin in range(max(0, end - self.longest), end):
                score = self.scores.get(token[begin:end])
                if score is not None:
                    best[end] = max(best[end], best[begin] + score)
        return float(best[-1])


def _grown_spec(spelling: Spelling, tokens: list[NewToken], growing: Any, first_id: int) -> dict[str, Any]:
    """The tokenizer.json of the grown tokenizer; its list of added tokens is the old one."""
    spec = json.loads(spelling.backend.to_str())
    model = spec["model"]
    # `tokenizers` numbers added tokens that the model does not know behind the model's own, whatever id the file says;
    # once the model has grown that would be another id. So the model knows them from now on; no merge reaches them.
    if model["type"] == "Unigram":
        names = {id: token for token, id in spelling.vocabulary.items()}
        low = 2 * min(score for _, score in model["vocab"])
        model["vocab"] += [[names.get(id, _filler(id)), low * len(names.get(id, ""))]
                           for id in range(len(model["vocab"]), first_id)]
        model["vocab"] += [[token.token, growing.new[token.token]] for token in tokens]
        return spec
    for added in spec["added_tokens"]:
        model["vocab"].setdefault(added["content"], added["id"])
    model["vocab"] |= {token.token: token.id for token in tokens}
    if spelling.kind == "bytes":
        model["merges"] += [list(pair) for pair in growing.ranks]
    else:
        known = model["vocab"]
        model["merges"] += [[text[:cut], text[cut:]] for text in growing.ranks for cut in range(1, len(text))
                            if text[:cut] in known and text[cut:] in known]
    return spec


def _filler(id: int) -> str:
    """The name of an id that no token has; no score keeps a unigram model from a name that a text spells, so none does."""
    return f"\uffff{id}"


def _falling(lowest: float, count: int) -> list[float]:
    """Scores below `lowest`, each below the one before, that stay apart in float32."""
    step = max(1.0, 2 * float(np.spacing(np.float32(abs(lowest)))))
    return [lowest - step * (number + 1) for number in range(count)]


def _unreached(grown: Tokenizer, spelling: Spelling, tokens: Iterable[NewToken]) -> list[str]:
    """The tokens that the algorithm does not come to when it reads them alone.

    Byte-level: through the whole tokenizer, or behind a line end where it writes a blank before whatever begins a text.
    SentencePiece writes that blank almost always, and what begins with ▁ is another piece: there the model itself is asked.
    """
    copy = Tokenizer.from_str(grown.to_str())
    if spelling.kind != "unigram":
        copy.model.ignore_merges = False  # which would find every token in the vocabulary, with or without merges
    missing = []
    for token in tokens:
        text = spelling.text(token.token)
        assert text is not None, "what was asked for is text"
        if spelling.kind == "bytes":
            found = any(copy.encode(before + text, add_special_tokens=False).ids ==
                        [*copy.encode(before, add_special_tokens=False).ids, token.id] for before in ("", "\n"))
        else:
            found = _ids_of(copy, token.token) == [token.id]
        if not found:
            missing.append(text)
    return missing


def _ids_of(backend: Tokenizer, token: str) -> list[int]:
    """The ids by which the algorithm spells a token, without normaliser and special tokens."""
    return [piece.id for piece in backend.model.tokenize(token)]


def kept_ids(spelling: Spelling, keep: Collection[int] = ()) -> tuple[int, ...]:
    """What stays when a vocabulary is replaced: special tokens, bytes, single characters and `keep`, by their old ids."""
    special = {*spelling.added, spelling.spec["model"].get("unk_token")}
    unknown = spelling.spec["model"].get("unk_id")
    return tuple(sorted(id for token, id in spelling.vocabulary.items()
                        if token in special or id in keep or id == unknown or len(token) == 1 or _is_byte(token)))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def stripped(spelling: Spelling, kept: tuple[int, ...]) -> Tokenizer:
    """The tokenizer with these tokens alone, numbered anew in their old order: what a vocabulary is replaced on."""
    spec = json.loads(spelling.backend.to_str())
    new = {old: id for id, old in enumerate(kept)}
    names = {id: token for token, id in spelling.vocabulary.items()}
    model = spec["model"]
    if model["type"] == "Unigram":
        rows, low = model["vocab"], min(score for _, score in model["vocab"])
        model["vocab"] = [rows[old] if old < len(rows) else [names[old], 2 * low * len(names[old])] for old in kept]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {names[old]: new[old] for old in kept}
        model["merges"] = []
    for added in spec["added_tokens"]:
        added["id"] = new[added["id"]]
    for part in _processors(spec["post_processor"]):
        for entry in part.get("special_tokens", {}).values() if isinstance(part.get("special_tokens"), dict) else ():
            entry["ids"] = [new[old] for old in entry["ids"]]
        for key in ("sep", "cls"):
            if isinstance(part.get(key), list):
                part[key][1] = new[part[key][1]]
    try:
        return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except ValueError as error:
        raise DataError(f"the tokenizer cannot be stripped: {error}") from None


def _processors(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if part is None else [part, *(inner for each in part.get("processors", []) for inner in _processors(each))]
