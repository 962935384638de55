"""WordPiece and SentencePiece's kinds: the same bytes always, the same ids in every library, every string back."""

import hashlib
import os
import subprocess
import sys

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.tokens.codec import Codec
from danlu.tokens.count import WordCounter, learnable
from danlu.tokens.encode import Encoder, check_chat
from danlu.tokens.labelled import Form
from danlu.tokens.splitting import SPLIT, word_pattern
from danlu.tokens.train import BERT_TOKENS, ROLES, Options, own_tokens, train_tokenizer
from tokens.samples import TEXT

sentencepiece = pytest.importorskip("sentencepiece")
KINDS = ("byte_bpe", "wordpiece", "unigram", "sentencepiece_bpe")
PIECES = KINDS[2:]
LINES = [TEXT, "今天天气很好。今天是晴天，天气好极了。GPT模型 2024年", "def add(a, b):\n    return a + b\n",
         "naïve Café café"] * 3
ODD = ["", " ", "  two  blanks ", "line\n\n\tends\r\n", "NUL\0", "<|user|>[MASK]", "𠀀🙂é́", "<0x41><unk><|end|>",
       "今天2024年 day", "\u200d\ufeff\u3000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        options = Options(kind, 520, ["[MASK]", "<|fim_prefix|>"] if kind != "wordpiece" else ["<|fim_prefix|>"])
        found[kind] = (train_tokenizer(LINES, options, folder), folder)
    return found


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


PROGRAM = """
import sys, pathlib
from danlu.tokens.train import Options, train_tokenizer
lines = pathlib.Path(sys.argv[1]).read_text("utf-8").split("\\x1e")
for kind in ("byte_bpe", "wordpiece", "unigram", "sentencepiece_bpe"):
    extra = ["[MASK]", "<|fim_prefix|>"] if kind != "wordpiece" else ["<|fim_prefix|>"]
    train_tokenizer(lines, Options(kind, 520, extra), pathlib.Path(sys.argv[2]) / kind)
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_same_texts_same_bytes_in_another_process_with_other_threads(trained, tmp_path, threads):
    (tmp_path / "lines").write_text("\x1e".join(LINES), "utf-8")
    environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true",
                   "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "lines"), str(tmp_path)], check=True, env=environment)
    for kind in KINDS:
        assert digests(tmp_path / kind) == digests(trained[kind][1]), kind


@pytest.mark.parametrize("kind", ["byte_bpe", *PIECES])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_every_string_comes_back(trained, kind, text):
    codec = Codec(trained[kind][0])
    [ids] = codec.encode_plain([text])
    assert codec.decode(ids) == text


@pytest.mark.parametrize("kind", PIECES)
def test_the_blank_of_sentencepiece_is_the_one_character_that_does_not(trained, kind):
    codec = Codec(trained[kind][0])
    assert codec.decode(codec.encode_plain(["a▁b"])[0]) == "a b"


@pytest.mark.parametrize("kind", PIECES)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.sampled_from("今天气aen d2.\n")),
                      st.sampled_from([*ODD, *LINES])))
def test_sentencepiece_gives_the_same_ids(trained, kind, text):
    tokenizer, folder = trained[kind]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    [ids] = Codec(tokenizer).encode_plain([text])
    assert model.encode(text) == ids.tolist()
    assert model.decode(ids.tolist()) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(trained, kind):
    tokenizer, folder = trained[kind]
    opened, file = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*ODD, *LINES]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert opened(text, add_special_tokens=False).input_ids == ids == file.encode(text, add_special_tokens=False).ids
    own = own_tokens(kind)
    assert opened.convert_tokens_to_ids(list(own)) == list(range(len(own)))
    assert {*own, "<|fim_prefix|>"} <= set(opened.all_special_tokens)
    assert opened.mask_token == "[MASK]"
    assert opened.eos_token_id is not None and opened.bos_token_id is not None and opened.pad_token_id is not None
    assert len(opened) == tokenizer.get_vocab_size() <= 520


@pytest.mark.parametrize("kind", KINDS)
def test_documents_begin_and_end(trained, kind):
    encoder = Encoder(AutoTokenizer.from_pretrained(trained[kind][1]), 64)
    encoder.check(dialogues=False)
    first, last = ("[CLS]", "[SEP]") if kind == "wordpiece" else ("<|bos|>", "<|end|>")
    assert [trained[kind][0].id_to_token(id) for id in encoder._ends_of_document()] == [first, last]
    if kind != "wordpiece":
        check_chat(encoder.chat, encoder.tokenizer.bos_token_id)


def test_the_template_of_wordpiece_ends_turns_with_its_own_token(trained):
    opened = AutoTokenizer.from_pretrained(trained["wordpiece"][1])
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert opened.apply_chat_template(messages, tokenize=False) == "[CLS]<|user|>hi[SEP]<|assistant|>yo[SEP]"


def test_wordpiece_is_berts(tmp_path, trained):
    tokenizer, folder = trained["wordpiece"]
    assert BERT_TOKENS == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert [tokenizer.id_to_token(id) for id in range(5)] == list(BERT_TOKENS)
    assert tokenizer.encode("Ж").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    assert Form.of(AutoTokenizer.from_pretrained(folder)).one == ((2,), (3,))
    assert tokenizer.encode("今天").tokens == ["[CLS]", "今天", "[SEP]"]
    small = train_tokenizer(LINES, Options("wordpiece", 520, lowercase=True, chinese="characters"), tmp_path)
    assert small.encode("Café", add_special_tokens=False).ids == small.encode("cafe", add_special_tokens=False).ids
    assert small.encode("今天").tokens == ["[CLS]", "今", "天", "[SEP]"]
    kept = train_tokenizer(LINES, Options("wordpiece", 520, lowercase=True, strip_accents=False), tmp_path)
    assert "é" in "".join(kept.encode("CAFÉ").tokens)


def test_wordpiece_compresses_as_that_of_tokenizers_does(tmp_path):
    """Ties are broken otherwise, and theirs has each letter without ## too."""
    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer, theirs.pre_tokenizer = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    theirs.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=320, special_tokens=[*BERT_TOKENS, *ROLES],
                                                                show_progress=False))
    ours = train_tokenizer(LINES, Options("wordpiece", 320, (), "free", "characters", character_coverage=1), tmp_path)
    counts = [sum(len(x.encode(line, add_special_tokens=False).ids) for line in LINES) for x in (ours, theirs)]
    assert counts[0] <= 1.01 * counts[1]
    assert not any("[UNK]" in ours.encode(line).tokens for line in LINES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chinese", "longest"), [("characters", 1), ("script", 8)])
def test_han_characters_and_digits(tmp_path, kind, chinese, longest):
    texts = ["，今天天气GPT今天天气，今天天气今天天气 2024 2024"] * 9
    tokenizer = train_tokenizer(texts, Options(kind, 420, digits="single", chinese=chinese), tmp_path)
    tokens = [tokenizer.decode([id], skip_special_tokens=False).removeprefix("##")
              for id in range(tokenizer.get_vocab_size())]
    tokens = [token for token in tokens if "\ufffd" not in token]
    found = max(len(token) for token in tokens if "天" in token)
    assert found == longest or (kind == "unigram" and 1 < found < longest)
    assert not any("天" in token and ("G" in token or "，" in token) for token in tokens)
    assert not any("20" in token for token in tokens)
    free = train_tokenizer(texts, Options(kind, 420, digits="free", chinese="free"), tmp_path)
    assert any("2024" in token for token in free.get_vocab())


def test_digits_in_groups(tmp_path):
    for kind in KINDS[:2]:
        tokenizer = train_tokenizer(["12345 12345 67"] * 9, Options(kind, 420, digits="groups"), tmp_path)
        tokens = tokenizer.encode("1234567", add_special_tokens=False).tokens
        assert "".join(tokens).startswith("123") and tokens[0] == "123", tokens


PARTS = ["今天", "，", "GPT", " ", "  ", "\n", "\r\n", "12345", "don't", "é́", "🙂", "〇", "\t", "・か", "﹏"]


@pytest.mark.parametrize("digits", ["single", "groups", "free"])
@pytest.mark.parametrize("chinese", ["free", "script", "characters"])
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=20))
def test_both_libraries_cut_words_alike_and_lose_nothing(digits, chinese, parts):
    text, pattern = "".join(parts), word_pattern(digits, chinese)
    words = regex.findall(pattern, text)
    assert "".join(words) == text
    assert [word for word, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)] == words


def test_the_pattern_that_has_always_been(trained):
    assert SPLIT == word_pattern() == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")


def test_rare_characters_are_cut_out_of_words():
    counter = WordCounter(regex.compile(SPLIT))
    counter.add("abzab ab ab")
    assert dict(counter.words) == {"abzab": 1, " ab": 2}
    assert learnable(counter.words, 1.0, 9) == {" ab": 2, "abzab": 1}
    assert learnable(counter.words, 0.9, 9) == {" ab": 2, "ab": 2}
    assert learnable({"aab": 3}, 1.0, 1) == {"aa": 3}
    assert learnable({"a" * 300: 2}, 1.0, 9) == {"a" * 256: 2, "a" * 44: 2}


def test_words_that_differ_in_line_ends_alone_are_one(tmp_path):
    """`!!` with and without a line end behind it is learned from all four."""
    tokenizer = train_tokenizer(["!!\n!!\n\n!!", "?; " * 3 + "!!"], Options("sentencepiece_bpe", 368), tmp_path)
    assert "!!" in tokenizer.get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_trained_is_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(["text"], Options(kind, 8 if kind == "wordpiece" else 261), tmp_path)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], Options(kind, 400), tmp_path)


@pytest.mark.parametrize(("kind", "token"), [("wordpiece", "hello"), ("sentencepiece_bpe", "☃")])
def test_special_tokens_that_text_could_spell_are_refused(tmp_path, kind, token):
    with pytest.raises(ConfigError, match="spelled by ordinary text"):
        train_tokenizer(LINES, Options(kind, 520, [token]), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_special_token(trained, kind):
    codec = Codec(trained[kind][0])
    own = [*own_tokens(kind), "<|fim_prefix|>"]
    ids = {trained[kind][0].token_to_id(token) for token in own} - {trained[kind][0].token_to_id("[UNK]")}
    for row in codec.encode_plain([*own, "".join(own), "a<|user|>b"]):
        assert not ids & set(row.tolist())


def test_scores_are_added_without_rounding(trained):
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained["unigram"][1] / "tokenizer.model"))
    scores = [model.get_score(id) for id in range(model.get_piece_size())]
    assert all(score * 64 == round(score * 64) for score in scores)
    assert len(set(scores)) > 5


def test_whole_words_are_among_the_first_pieces_of_unigram(tmp_path):
    """They are not where a word that is counted stands in one line alone, or is always followed by the end of its line."""
    tokenizer = train_tokenizer(["of government and parliament, parliament and government; " * 20],
                                Options("unigram", 400), tmp_path)
    assert {"▁government", "▁parliament"} <= set(tokenizer.get_vocab())


def test_a_special_token_as_long_as_a_sentence(tmp_path):
    token = "<|" + "x" * 150 + "|>"
    trained = train_tokenizer(LINES, Options("unigram", 520, [token]), tmp_path)
    assert trained.encode(token, add_special_tokens=False).ids == [trained.token_to_id(token)]
