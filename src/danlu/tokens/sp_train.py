"""Training SentencePiece's kinds, Unigram and BPE with bytes for what is not known, by the library that defined them.

Words and their counts go in, not text, so what must be held is the words. The file is the same for the same words: the
library's sums depend on the number of its threads, which is therefore always the same (`THREADS`) on every machine.
`tokenizer.json` is written from the file's pieces, so `transformers`, `tokenizers` and `sentencepiece` give the same ids.
No blank is put before a text and none is taken away: text comes back as it was, but for ▁ (U+2581) itself, which stands for
a blank here.

    tokenizer, model = train_sentencepiece(texts, "unigram", 32000, special_tokens)
    (folder / "tokenizer.model").write_bytes(model)
"""

import io
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import regex
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from danlu.core.errors import ConfigError, DataError
from danlu.tokens.codec import chunks_of
from danlu.tokens.count import WordCounter, is_text, learnable
from danlu.tokens.sp_model import delimited
from danlu.tokens.splitting import Chinese, Digits, word_pattern

Algorithm = Literal["unigram", "bpe"]
UNK = "<unk>"
ASCII = [chr(code) for code in range(0x21, 0x7F)]  # always in the alphabet, and so is what special tokens are spelled with
BLANK = "▁"  # U+2581, which SentencePiece writes for a blank
THREADS = 16  # of the library; the sums of unigram training depend on it
SEEDS = 16  # lines of a frequent word
SCORES = 64  # of a nat, in which unigram scores are written
MAX_SENTENCE = 4096  # bytes; a word has at most MAX_WORD characters, with their counts
NEVER = -10_000.0  # score of special tokens and bytes in tokenizer.json, so that no text that spells one becomes it


def least_size(special_tokens: Sequence[str]) -> int:
    """The smallest vocabulary: special tokens, every byte, the characters that are always there, and two pieces."""
    return 256 + len(special_tokens) + len({*ASCII, *"".join(special_tokens)}) + 2


def train_sentencepiece(texts: Iterable[str], algorithm: Algorithm, vocab_size: int, special_tokens: Sequence[str], *,
                        chinese: Chinese = "script", digits: Digits = "single", character_coverage: float = 0.9995
                        ) -> tuple[Tokenizer, bytes]:
    """The tokenizer and the bytes of its `tokenizer.model`. The special tokens begin with those for begin, end and pad.

    Raises ConfigError for a vocabulary that cannot hold every byte, DataError where there is no text.
    """
    short = next((token for token in special_tokens if len(token) < 2), None)
    if short is not None:
        raise ConfigError(f"the special token “{short}” could be spelled by ordinary text",
                          hint="Put marks around a name, as in <|name|>.")
    always = {*ASCII, *"".join(special_tokens)}
    if vocab_size < least_size(special_tokens):
        raise ConfigError(f"vocab_size {vocab_size} is too small for 256 bytes, {len(always)} characters that are always "
                          f"there and {len(special_tokens)} special tokens",
                          hint=f"Use {least_size(special_tokens)} or more; a few thousand is usual for small corpora.")
    counter = WordCounter(regex.compile(word_pattern(digits, chinese)))
    for text in texts:
        for chunk in chunks_of(text):
            counter.add(chunk)
    printed: Counter[str] = Counter()
    for word, count in counter.words.items():
        printed[_text_of(word)] += count
    del printed[""]
    words = learnable(printed, character_coverage, (vocab_size - least_size(special_tokens)) // 2 + 2)
    if not words:
        raise DataError("there is no text to train a tokenizer on")
    model = _train(_lines(words, SEEDS if algorithm == "unigram" else 1), algorithm, vocab_size, special_tokens)
    return from_model(model, algorithm, special_tokens), model


def _text_of(word: str) -> str:
    """The word without line ends and control characters, which are always spelled with bytes."""
    return word if word.isprintable() else "".join(filter(is_text, word))


def _lines(words: Mapping[str, int], most: int) -> Iterator[str]:
    """Each word with its count, in as many lines as it stands in the text, at most so many, and a blank behind the first.

    Unigram training takes its first pieces from what stands in several lines and goes on differently, and only then cuts
    lines at blanks and joins equal ones. Without the blank no word that is always the same would be a first piece.
    """
    for word, count in words.items():
        text, lines = word.replace(" ", BLANK), min(count, most)
        if lines == 1:
            yield f"{text}\t{count}"
            continue
        yield f"{text}{BLANK}\t1"
        for line in range(lines - 1):
            yield f"{text}\t{(count - 1) // (lines - 1) + (line < (count - 1) % (lines - 1))}"


def _train(words: Iterable[str], algorithm: Algorithm, vocab_size: int, special_tokens: Sequence[str]) -> bytes:
    sentencepiece = _library()
    bos, end, pad, unk, *others = special_tokens
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), input_format="tsv", model_writer=written, model_type=algorithm,
            vocab_size=vocab_size, hard_vocab_limit=False, num_threads=THREADS, max_sentence_length=MAX_SENTENCE,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            split_by_unicode_script=False, split_by_number=False, split_by_whitespace=True, split_digits=False,
            allow_whitespace_only_pieces=True, byte_fallback=True, character_coverage=1.0,
            required_chars="".join(sorted({*ASCII, *"".join(special_tokens)})),
            bos_id=0, eos_id=1, pad_id=2, unk_id=3, bos_piece=bos, eos_piece=end, pad_piece=pad, unk_piece=unk,
            unk_surface=unk, control_symbols=others, minloglevel=2)
    except RuntimeError as error:
        raise DataError(f"sentencepiece could not learn {vocab_size:,} pieces: {' '.join(str(error).split())}",
                        hint="Less vocabulary or more text may do.") from None
    return written.getvalue() if algorithm == "bpe" else _round_scores(written.getvalue())


def _round_scores(model: bytes) -> bytes:
    """The model with scores that are multiples of 1/64, whose sums are exact in float32 up to 262,144 nats.

    sentencepiece adds them in float32 and tokenizers in float64; rounding would let them choose otherwise where two ways to
    cut a word are nearly as good.
    """
    processor = _library().SentencePieceProcessor(model_proto=model)
    found, at = bytearray(model), 0
    for id in range(processor.get_piece_size()):
        name, score = processor.id_to_piece(id).encode(), processor.get_score(id)
        # ModelProto.SentencePiece: {string piece = 1; float score = 2}, both always written
        before = delimited(1, name) + b"\x15"
        at = model.index(before + struct.pack("<f", score), at) + len(before)
        found[at:at + 4] = struct.pack("<f", round(score * SCORES) / SCORES)
    return bytes(found)


def from_model(model: bytes, algorithm: Algorithm, special_tokens: Sequence[str]) -> Tokenizer:
    """A `tokenizers` tokenizer that does what a SentencePiece model with bytes for the unknown does."""
    processor = _library().SentencePieceProcessor(model_proto=model)
    pieces = [(processor.id_to_piece(id), processor.get_score(id)) for id in range(processor.get_piece_size())]
    ordinary = [not (processor.is_control(id) or processor.is_unknown(id) or processor.is_byte(id))
                for id in range(len(pieces))]
    if algorithm == "unigram":
        pieces = [(piece, score if mine else NEVER) for (piece, score), mine in zip(pieces, ordinary, strict=True)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    else:
        vocabulary = {piece: id for id, (piece, _) in enumerate(pieces)}
        chosen = sorted((-score, id, piece) for id, (piece, score) in enumerate(pieces) if ordinary[id])
        usable = {piece for _, _, piece in chosen}
        merges = [pair for _, _, piece in chosen for pair in _ways(piece, usable, vocabulary)]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer


def _ways(piece: str, usable: set[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that spell this one: SentencePiece joins whatever two neighbours do."""
    pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in usable and piece[i:] in usable]
    return sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _library() -> Any:
    """The package sentencepiece. Raises ConfigError where it is not installed."""
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError("unigram and sentencepiece_bpe need the package sentencepiece",
                          hint="pip install 'danlu[sentencepiece]'") from None
    return sentencepiece
