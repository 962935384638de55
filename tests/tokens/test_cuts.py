"""Cut texts give the ids of whole ones, for every splitter that is known and vocabularies that join what they can."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from danlu.tokens import codec as codec_module
from danlu.tokens.codec import Codec
from danlu.tokens.cuts import cuts_of
from danlu.tokens.splitting import SPLIT_PATTERNS
from tokens.samples import TEXT

# every kind of character that a rule or a splitter knows, and some that only look like one
ALPHABET = ["a", "s", "T", "天", "地", "人", "1", "2", "٣", "²", "Ⅳ", ".", ",", "'", "’", "，", "。", "“", "_", "<", " ",
            " ", " ", "\n", "\n", "\r", "\t", "\u3000", "\u00a0", "\u200b", "\x1c", "\x85", "é", "\u0301", "\u0338", "か",
            "я", "🙂", "▁", "ſ", "\0"]
GPT4O = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}|\s+(?!\S)|\s+"


def noise(number, seed=0, most=30):
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, most))) for _ in range(number)]


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def splitter(name):
    """GPT-2's own, SmolLM's, and each pattern alone and behind split digits."""
    if name in ("gpt2", "smollm"):
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        parts = [split(name.removeprefix("digits ")), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if name == "smollm" or name.startswith("digits "):
        parts = [pre_tokenizers.Digits(individual_digits=True), *parts]
    return pre_tokenizers.Sequence(parts)


def byte_level(name, normalizer=None, texts=None, size=500):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter(name)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts or noise(1000, 1), trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"]))
    return tokenizer


def characters(texts=None):
    """SentencePiece's BPE without a splitter: tokens of several words, of blanks, of line ends."""
    alphabet = sorted({*ALPHABET, "▁"} - {" ", "🙂", "か"})
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(texts or noise(1000, 2), trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]))
    state = json.loads(tokenizer.to_str())  # the bytes are no special tokens, or texts that spell one would become it
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    return Tokenizer.from_str(json.dumps(state))


def whole(codec, texts):
    return [encoding.ids for encoding in codec.plain.encode_batch_fast(texts, add_special_tokens=False)]


def assert_same(tokenizer, texts):
    """Of each text the ids of its parts; how many parts there were."""
    codec = Codec(tokenizer)
    cuts = cuts_of(tokenizer.to_str())
    units, places = cuts.units(texts)
    assert ["".join(units[place]) for place in places] == texts
    known = dict(zip(units, whole(codec, units), strict=True))
    for text, place, ids in zip(texts, places, whole(codec, texts), strict=True):
        assert list(itertools.chain.from_iterable(known[unit] for unit in units[place])) == ids, (text, units[place])
    fit = [unit for unit, fits in zip(units, cuts.fit_in_lines(units), strict=True) if fits]
    [[line_end]] = whole(codec, ["\n"])
    for start in range(0, len(fit), 7):
        lines = [known[unit] for unit in fit[start:start + 7]]
        expected = [id for line in lines for id in (*line, line_end)][:-1]
        assert whole(codec, ["\n".join(fit[start:start + 7])]) == [expected], fit[start:start + 7]
    return sum(place.stop - place.start for place in places)


NAMES = ["gpt2", "smollm", *sorted(SPLIT_PATTERNS), *("digits " + pattern for pattern in sorted(SPLIT_PATTERNS))]


@pytest.mark.parametrize("name", NAMES)
def test_no_cut_changes_an_id_whatever_the_splitter(name):
    tokenizer = byte_level(name)
    assert assert_same(tokenizer, noise(2000, 3)) > 5000


@pytest.mark.parametrize("name", ["gpt2", "smollm", sorted(SPLIT_PATTERNS)[0]])
def test_all_short_texts(name):
    """Every text of four of the characters on which the rules turn."""
    tokenizer = byte_level(name)
    assert_same(tokenizer, ["".join(row) for row in itertools.product("a天1.， \n'\t", repeat=4)])


def test_composed_letters_are_no_reason_to_cut():
    """NFC makes one letter of two behind a cut, and a token may hold it with the mark before."""
    texts = [*["x(e\u0301 x(e\u0301 x(\u00e9 天e\u0301。e\u0301"] * 300, *noise(1000, 4)]
    tokenizer = byte_level(sorted(SPLIT_PATTERNS)[0], normalizers.NFC(), texts)
    assert "(Ã©" in tokenizer.get_vocab()
    assert_same(tokenizer, texts)


def test_a_tokenizer_without_splitter_is_cut_where_no_token_joins():
    tokenizer = characters()
    assert any(" " in token.replace("▁", " ")[1:-1] for token in tokenizer.get_vocab())
    assert assert_same(tokenizer, [*noise(2000, 5), "a ▁ 天▁▁ 地", "<0x41> <unk>"]) > 4000


def test_tokens_that_hold_parts_of_characters_forbid_cuts():
    texts = ["天地" * 20, "地人天" * 20, "丁七万丈三上下不与丐丑专且世丘丙业丛东丝" * 5]
    tokenizer = byte_level("gpt2", texts=texts, size=300)
    assert any(len(token) % 3 and not token.isascii() and len(token) > 3 for token in tokenizer.get_vocab())
    assert_same(tokenizer, [*texts, "".join(chr(0x4E00 + 7 * i % 3000) for i in range(2000))])


def test_a_long_word_that_merges_would_not_find_is_not_cut_out():
    """With ignore_merges a word of the vocabulary is taken as it is: parts of words are not words there."""
    state = json.loads(byte_level("gpt2", texts=["ab ab cd"], size=270).to_str())
    for token in ("天地", "天", "地"):
        letters = "".join(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)[0][0])
        state["model"]["vocab"].setdefault(letters, len(state["model"]["vocab"]))
    for ignore in (True, False):
        state["model"]["ignore_merges"] = ignore
        tokenizer = Tokenizer.from_str(json.dumps(state))
        assert_same(tokenizer, ["天地", "人天", "天人", "天人地，天地人", "ab天"])
        codec = Codec(tokenizer)
        assert len(codec.encode_plain(["天"])[0]) == (1 if ignore else 3)


@pytest.mark.parametrize("change", [
    lambda state: state["model"].update(dropout=0.1),
    lambda state: state["model"].update(continuing_subword_prefix="##"),
    lambda state: state["model"]["vocab"].pop("Ġ"),
    lambda state: state.update(normalizer={"type": "Lowercase"}),
    lambda state: state.update(normalizer={"type": "NFKC"}),
    lambda state: state.update(pre_tokenizer=None),
    lambda state: state.update(pre_tokenizer={"type": "Whitespace"}),
    lambda state: state.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
    lambda state: state["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
    lambda state: state["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Split", "pattern": {"Regex": GPT4O},
                                                                     "behavior": "Isolated", "invert": False}),
])
def test_tokenizers_of_another_make_are_left_alone(change):
    state = json.loads(byte_level("gpt2", size=300).to_str())
    assert cuts_of(json.dumps(state)) is not None
    state["model"]["merges"] = []
    change(state)
    assert cuts_of(json.dumps(state)) is None


def test_words_and_their_marks_are_parts_of_their_own():
    tokenizer = byte_level("smollm", texts=[TEXT], size=400)
    units, places = cuts_of(tokenizer.to_str()).units(["Some text, don't!\nIn 1998\n\n一些，汉字", "", "x"])
    assert units[places[0]] == ["Some", " text", ",", " don't", "!\n", "In", " 1998", "\n\n一", "些", "，", "汉", "字"]
    assert (units[places[1]], units[places[2]]) == ([], ["x"])


# The codec: what was read before is not encoded again, and nobody can tell -----------------------------------------


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(codec_module, "MUCH", 0)


def test_remembered_ids_are_those_of_the_text(always, monkeypatch):
    texts = [*noise(300, 6, most=200), TEXT, "", "long " + "x" * 500]
    for tokenizer in (byte_level("gpt2"), characters()):
        codec = Codec(tokenizer)
        expected = whole(codec, texts)
        for most in (1 << 19, 50, 0):  # with a memory that is too small as well
            monkeypatch.setattr(codec_module, "MOST", most)
            for group in (1 << 20, 1000, 1):
                monkeypatch.setattr(codec_module, "GROUP", group)
                found = codec.encode_plain(texts)
                assert [row.tolist() for row in found] == expected and {row.dtype for row in found} == {np.dtype(np.int32)}
        assert 0 < max(map(len, codec._ids)) <= codec_module.LONGEST


def test_a_part_is_encoded_once(always, monkeypatch):
    codec = Codec(byte_level("gpt2"))
    asked = []
    encode = codec._encode_whole
    monkeypatch.setattr(codec, "_encode_whole", lambda texts: asked.append(list(texts)) or encode(texts))
    codec.encode_plain(["a cat and a dog", "a dog and a cow"])
    assert asked == [["\t"], ["\n", "a\n cat\n and\n a\n dog\n cow"], ["a cat and a dog", "a dog and a cow"]]
    codec.encode_plain(["a dog and a bee."])
    assert asked[3:] == [["."], ["\n", " bee"]]


def test_where_cutting_would_change_ids_nothing_is_cut(always, monkeypatch):
    """The first texts are encoded both ways: a splitter might not do what its pattern says."""
    codec = Codec(byte_level("gpt2"))
    monkeypatch.setattr(type(codec._cuts), "_cuts", lambda self, codes: np.ones(len(codes) + 1, bool))  # everywhere
    for texts in ([TEXT, "a cat and a dog"], ["a dog and a bee"]):
        assert [row.tolist() for row in codec.encode_plain(texts)] == whole(codec, texts)
    assert codec._cuts is None


def test_tokens_added_to_the_vocabulary_are_found(always):
    """Those that are not special are read in running text too, wherever a cut might have been."""
    tokenizer = byte_level("gpt2")
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False),
                          AddedToken("and so on", lstrip=True, normalized=False)])
    codec = Codec(tokenizer)
    texts = ["a <tool_call> b", "x, and so on.", "<|end|> a", "and so", *noise(20, 7)]
    found = codec.encode_plain(texts)
    assert [row.tolist() for row in found] == whole(codec, texts)
    assert tokenizer.token_to_id("<tool_call>") in found[0] and tokenizer.token_to_id("and so on") in found[1]
    assert tokenizer.token_to_id("<|end|>") not in found[2]


def test_few_characters_are_encoded_as_they_are():
    codec = Codec(byte_level("gpt2"))
    codec.encode_plain([TEXT])
    assert not codec._ids and "_cuts" not in vars(codec)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text(texts):
    tokenizer = test_any_text.tokenizer = vars(test_any_text).get("tokenizer") or byte_level("smollm")
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    if texts:
        assert_same(tokenizer, texts)
