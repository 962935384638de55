"""Training a tokenizer of one's own, of four kinds, that transformers opens; the same bytes from the same texts.

    byte_bpe           BPE over bytes (GPT-2, Llama-3, Qwen): every string round-trips
    unigram            SentencePiece's Unigram, with bytes for what is not known: every string round-trips
    sentencepiece_bpe  SentencePiece's BPE, with bytes for what is not known: every string round-trips
    wordpiece          BERT's: blanks are lost, and unknown words become [UNK]

Special tokens get the first ids and are never added by the tokenizer itself (but WordPiece's frame, [CLS] … [SEP], which
danlu's encoders take off): the chat template writes those of dialogues, the encoder those of documents.

    tokenizer = train_bpe(texts, vocab_size=4096, folder=work)
    tokenizer = train_tokenizer(texts, Options("unigram", 32000), folder=work)
    AutoTokenizer.from_pretrained(work)
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from danlu.core.errors import ConfigError, DataError
from danlu.tokens import sp_train, wordpiece
from danlu.tokens.codec import Codec, chunks_of
from danlu.tokens.denoise import MASKS
from danlu.tokens.splitting import SPLIT, Chinese, Digits, word_pattern

__all__ = ["SPLIT", "Options", "save_tokenizer", "train_bpe", "train_tokenizer"]

Kind = Literal["byte_bpe", "wordpiece", "unigram", "sentencepiece_bpe"]
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, END, PAD, *ROLES)
BERT_TOKENS = (wordpiece.PAD, wordpiece.UNK, wordpiece.CLS, wordpiece.SEP, wordpiece.MASK)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
NAMES = "Put marks around a name, as in <|name|>."
_NAME = re.compile(r"(?!<0x[0-9A-F]{2}>)(?:[^\w\s]|_).*[^\W_].*(?:[^\w\s]|_)")  # <0x41> is a byte of SentencePiece
MODEL_MAX_LENGTH = 1_000_000_000  # the tokenizer has no limit; the model has

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

NAMED = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}  # what special tokens are for


@dataclass(frozen=True, slots=True)
class Options:
    """What a tokenizer is to be; `special_tokens` come after those that its kind always has.

    character_coverage   share of the text whose characters are learned, the most frequent first; not for byte_bpe
    lowercase, strip_accents   of WordPiece's normaliser; strip_accents None: as lowercase says
    """

    kind: Kind
    vocab_size: int
    special_tokens: Sequence[str] = ()
    digits: Digits = "single"
    chinese: Chinese = "free"
    character_coverage: float = 0.9995
    lowercase: bool = False
    strip_accents: bool | None = None

    @property
    def all_special(self) -> list[str]:
        """Every special token in the order of the ids, which begin at 0."""
        return list(dict.fromkeys([*own_tokens(self.kind), *self.special_tokens]))

    @property
    def least_size(self) -> int:
        """The smallest vocabulary that holds what it must."""
        if self.kind in ("unigram", "sentencepiece_bpe"):
            return sp_train.least_size(self.all_special)
        return len(self.all_special) + (256 if self.kind == "byte_bpe" else 2)


def own_tokens(kind: Kind) -> tuple[str, ...]:
    """The special tokens that a kind always has."""
    if kind == "wordpiece":
        return (*BERT_TOKENS, *ROLES)
    return SPECIAL_TOKENS if kind == "byte_bpe" else (BOS, END, PAD, sp_train.UNK, *ROLES)


def train_tokenizer(texts: Iterable[str], options: Options, folder: Path) -> Tokenizer:
    """Trains on the texts and saves what AutoTokenizer reads into the folder, SentencePiece's `tokenizer.model` too.

    The vocabulary is smaller than asked for where the texts hold too little. Raises ConfigError for a size that cannot hold
    what it must, DataError where there is no text.
    """
    special = options.all_special
    if options.kind == "byte_bpe":
        return train_bpe(texts, options.vocab_size, folder, options.special_tokens, options.digits, options.chinese)
    if options.kind == "wordpiece":
        tokenizer = wordpiece.train_wordpiece(
            texts, options.vocab_size, special, lowercase=options.lowercase, strip_accents=options.strip_accents,
            chinese=options.chinese, digits=options.digits, character_coverage=options.character_coverage)
        save_tokenizer(tokenizer, folder, special, {
            "bos_token": wordpiece.CLS, "eos_token": wordpiece.SEP, "cls_token": wordpiece.CLS, "sep_token": wordpiece.SEP,
            "pad_token": wordpiece.PAD, "unk_token": wordpiece.UNK})
        return tokenizer
    tokenizer, model = sp_train.train_sentencepiece(
        texts, "unigram" if options.kind == "unigram" else "bpe", options.vocab_size, special, chinese=options.chinese,
        digits=options.digits, character_coverage=options.character_coverage)
    save_tokenizer(tokenizer, folder, special, {**NAMED, "unk_token": sp_train.UNK})
    (folder / "tokenizer.model").write_bytes(model)
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path, special_tokens: Sequence[str] = (),
              digits: Digits = "single", chinese: Chinese = "free") -> Tokenizer:
    """Trains byte-level BPE and saves tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder.

    special_tokens come after danlu's own. The vocabulary is smaller than asked for where the texts hold too little.
    Raises ConfigError for a size that cannot hold every byte, DataError where there is no text.
    """
    special = list(dict.fromkeys([*SPECIAL_TOKENS, *special_tokens]))
    if vocab_size < 256 + len(special):
        raise ConfigError(f"vocab_size {vocab_size} is too small for 256 bytes and {len(special)} special tokens",
                          hint=f"Use {256 + len(special)} or more; a few thousand is usual for small corpora.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(word_pattern(digits, chinese)), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special])
    counter = _Counter(texts)
    tokenizer.train_from_iterator(counter, trainer)
    if counter.characters == 0:
        raise DataError("there is no text to train a tokenizer on")
    save_tokenizer(tokenizer, folder, special)
    return tokenizer


class _Counter:
    """Hands texts on in chunks, so that a large file uses every core, and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield from chunks_of(text)


def is_name(token: str) -> bool:
    """Whether a special token has marks around it, so that no ordinary text is full of it: <|name|>, [NAME], __name__."""
    return _NAME.fullmatch(token) is not None


def require_unspellable(tokenizer: Tokenizer, special: Sequence[str]) -> None:
    """Raises ConfigError where text that spells a special token becomes it although it is read as ordinary text."""
    codec = Codec(tokenizer)
    for token, ids in zip(special, codec.encode_plain(special), strict=True):
        if tokenizer.token_to_id(token) in ids.tolist():
            raise ConfigError(f"the special token “{token}” could be spelled by ordinary text", key="special_tokens",
                              hint="Give more text: this is too little to learn what spells it." if is_name(token)
                              else NAMES)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, special: Sequence[str] = SPECIAL_TOKENS,
                   named: Mapping[str, str] = NAMED) -> None:
    """Writes the three files that `AutoTokenizer.from_pretrained` reads, without importing transformers.

    named  what special tokens are for, as transformers calls it
    """
    mask = next((token for token in special if token in MASKS), None)
    named = {**named, **({} if mask is None else {"mask_token": mask})}
    require_unspellable(tokenizer, [token for token in special if token != named.get("unk_token")])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "extra_special_tokens": [token for token in special if token not in named.values()],
        "add_bos_token": False, "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    template = CHAT_TEMPLATE.replace(END, named["eos_token"])
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
