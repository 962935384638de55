"""Training a tokenizer of one's own: byte-level BPE that transformers opens, the same bytes from the same texts.

Every string round-trips, digits stand alone, and words are split with one pattern for all languages. Special tokens
get the first ids and are never added by the tokenizer itself: the chat template writes those of dialogues, the encoder
those of documents.

    tokenizer = train_bpe(texts, vocab_size=4096, folder=work)
    AutoTokenizer.from_pretrained(work)
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Document
from danlu.tokens.codec import Codec, chunks_of

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, END, PAD, "<|system|>", "<|user|>", "<|assistant|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MODEL_MAX_LENGTH = 1_000_000_000  # the tokenizer has no limit; the model has

# Contractions, words with one leading mark or space, single digits, marks with line ends, line ends, other spaces.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")

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


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Trains on the texts and saves tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder.

    special_tokens come after danlu's own. The vocabulary is smaller than asked for where the texts hold too little.
    Raises ConfigError for a size that cannot hold every byte, DataError where there is no text.
    """
    special = list(dict.fromkeys([*SPECIAL_TOKENS, *special_tokens]))
    if vocab_size < 256 + len(special):
        raise ConfigError(f"vocab_size {vocab_size} is too small for 256 bytes and {len(special)} special tokens",
                          hint=f"Use {256 + len(special)} or more; a few thousand is usual for small corpora.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path, special: Sequence[str] = SPECIAL_TOKENS) -> None:
    """Writes the three files that `AutoTokenizer.from_pretrained` reads, without importing transformers."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS, "eos_token": END, "pad_token": PAD,
        "extra_special_tokens": [token for token in special if token not in (BOS, END, PAD)],
        "add_bos_token": False, "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def bytes_per_token(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, float]:
    """Category to UTF-8 bytes per token, and "all". More is better: a longer text in the same number of tokens.

    The tokens are those that documents are trained on: special tokens in the text are ordinary text.
    """
    codec = Codec(tokenizer)
    sizes: dict[str, list[int]] = {}
    for document in documents:
        tokens = len(codec.encode_plain([document.text])[0])
        for name in ("all", document.category):
            entry = sizes.setdefault(name, [0, 0])
            entry[0] += len(document.text.encode())
            entry[1] += tokens
    return {name: count / tokens for name, (count, tokens) in sorted(sizes.items()) if tokens}
