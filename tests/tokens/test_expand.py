"""A grown vocabulary: reached by the tokenizer's own algorithm, old text as before, the same ids wherever it is opened."""

import json
import random
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.tokens import sp_model
from danlu.tokens.codec import num_ids
from danlu.tokens.expand import _unreached, grow, kept_ids
from danlu.tokens.learn import learn_pieces
from danlu.tokens.spelling import LETTERS, Spelling, fault_of
from tokens.growing import CHINESE, ENGLISH, KINDS, MAKERS, PIECES, byte_level

FOLDERS = {kind: MAKERS[kind](Path(mkdtemp())) for kind in KINDS}
OLD = {kind: Tokenizer.from_file(str(folder / "tokenizer.json")) for kind, folder in FOLDERS.items()}
GROWN = {kind: grow(old, PIECES, num_ids(old)) for kind, old in OLD.items()}
OFTEN = "你好人工智能研究生命，龘 的a\n<"
TEXTS = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(OFTEN)))


def ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def backwards(kind: str, found: list[int]) -> list[int]:
    """New tokens put back into the old ones that spelled them."""
    parts = {token.id: token.parts for token in GROWN[kind].tokens}
    return [old for id in found for old in parts.get(id, (id,))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_is_reached_and_old_text_stays(kind):
    growth, old = GROWN[kind], OLD[kind]
    # The GPT-2 splitter parts the comma from what follows; SentencePiece knows no such border.
    assert growth.refused == ([(8, "the tokenizer splits it")] if kind == "bytes" else [])
    assert growth.unreached == []
    wanted = {growth.old.text(token.token) for token in growth.tokens if token.wanted}
    assert wanted == set(PIECES if kind != "bytes" else PIECES[:-1])
    for text in ENGLISH[:3]:
        assert ids(growth.backend, text) == ids(old, text)
    assert len(ids(growth.backend, CHINESE)) < 0.6 * len(ids(old, CHINESE))
    assert backwards(kind, ids(growth.backend, CHINESE)) == ids(old, CHINESE)
    assert [token.id for token in growth.tokens] == list(range(num_ids(old), growth.num_ids))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_algorithm_and_no_list_of_added_tokens(kind):
    before, after = json.loads(OLD[kind].to_str()), json.loads(GROWN[kind].backend.to_str())
    assert after["added_tokens"] == before["added_tokens"]
    assert {key: after[key] for key in after if key != "model"} == {key: before[key] for key in before if key != "model"}
    if kind == "unigram":
        assert after["model"]["vocab"][:len(before["model"]["vocab"])] == before["model"]["vocab"]
    else:
        old = before["model"]["merges"]
        assert after["model"]["merges"][:len(old)] == old and len(after["model"]["merges"]) > len(old)
        assert before["model"]["vocab"].items() <= after["model"]["vocab"].items()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_random_unicode(kind, text):
    old, growth = OLD[kind], GROWN[kind]
    before, after = ids(old, text), ids(growth.backend, text)
    decoded = growth.backend.decode(after, skip_special_tokens=False)
    assert decoded == old.decode(before, skip_special_tokens=False)
    if kind == "bytes":
        assert decoded == growth.old.normalized(text)
    elif not text.startswith(" ") and "▁" not in text:
        assert decoded == text
    if kind != "unigram":  # whose ties may fall the other way
        assert backwards(kind, after) == before


def test_a_chain_of_merges_down_from_bytes():
    """Parts that are wanted come first, then whole characters, then halves of the word."""
    growth = GROWN["bytes"]
    model = json.loads(growth.backend.to_str())["model"]
    new = [tuple(growth.old.text(part) or part for part in pair) for pair in model["merges"][-growth.num_merges:]]
    whole = [pair for pair in new if all(len(part) <= 4 and not set(part) <= set(LETTERS) for part in pair)]
    assert whole[:4] == [("你", "好"), ("人", "工"), ("智", "能"), ("人工", "智能")]
    assert ("研究", "生") in whole and ("生", "命") in whole
    assert [text for token in growth.tokens if not token.wanted and (text := growth.old.text(token.token)) and len(text) > 1
            ] == []  # no word that nobody asked for
    balanced = grow(OLD["bytes"], ["人工智能"], num_ids(OLD["bytes"]))
    words = [text for token in balanced.tokens if (text := balanced.old.text(token.token)) and len(text) > 1]
    assert words == ["人工", "智能", "人工智能"]
    assert [token.wanted for token in balanced.tokens][-3:] == [False, False, True]


def test_the_same_pieces_in_the_same_order_of_merging_as_a_reference():
    """Every token is made as a plain greedy BPE over all merges makes it, old and new."""
    growth = GROWN["bytes"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(json.loads(growth.backend.to_str())["model"]["merges"])}
    names = {id: token for token, id in growth.backend.get_vocab().items()}
    for word in [*PIECES[:-1], "研究生命", "智能人工", "好人工", "quick", "的了"]:
        row = list(growth.old.token(word))
        while pairs := [(ranks[pair], at) for at, pair in enumerate(pairwise(row)) if pair in ranks]:
            at = min(pairs)[1]
            row[at:at + 2] = [row[at] + row[at + 1]]
        assert [names[id] for id in ids(growth.backend, word)] == row


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_ids_begin_behind_added_tokens_and_stay_there_when_opened(tmp_path, tokenizer_class):
    source = byte_level(tmp_path / "old", tokenizer_class)
    old = AutoTokenizer.from_pretrained(source)
    growth = grow(old.backend_tokenizer, PIECES, num_ids(old))
    growth.write(source, tmp_path / "new")
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert growth.first_id == max(old.get_vocab().values()) + 1
    assert new.eos_token_id == old.eos_token_id == growth.first_id - 2
    assert new.get_vocab()["<|pad|>"] == old.get_vocab()["<|pad|>"]
    text = CHINESE + "<|endoftext|>The lazy dog<|pad|>"
    assert new(text)["input_ids"] == growth.backend.encode(text).ids
    assert max(new(CHINESE)["input_ids"]) >= growth.first_id
    assert new.decode(new(text)["input_ids"]) == text
    assert len(new) == growth.num_ids


def test_old_vocabulary_files_do_not_stay_behind(tmp_path):
    source = byte_level(tmp_path / "old", "GPT2Tokenizer")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    growth = grow(AutoTokenizer.from_pretrained(source).backend_tokenizer, PIECES, 400)
    growth.write(source, tmp_path / "new")
    slow = Tokenizer(models.BPE.from_file(str(tmp_path / "new/vocab.json"), str(tmp_path / "new/merges.txt")))
    token = growth.old.token("人工智能")
    assert slow.token_to_id(token) == growth.backend.token_to_id(token) >= 400


def test_whole_words_of_the_vocabulary_without_merges(tmp_path):
    """Llama-3's ignore_merges finds a word in the vocabulary; inside longer words the merges still have to be there."""
    old = Tokenizer.from_file(str(byte_level(tmp_path, ignore_merges=True) / "tokenizer.json"))
    growth = grow(old, PIECES, num_ids(old))
    assert growth.unreached == []
    assert growth.backend.token_to_id(growth.old.token("人工智能")) in ids(growth.backend, "说人工智能了")
    assert ids(growth.backend, "人工智能") == [growth.backend.token_to_id(growth.old.token("人工智能"))]
    spec = json.loads(growth.backend.to_str())
    spec["model"]["merges"] = spec["model"]["merges"][:-growth.num_merges]
    without = Tokenizer.from_str(json.dumps(spec))
    assert len(ids(without, "人工智能")) == 1  # found, not reached
    assert "人工智能" in _unreached(without, growth.old, [token for token in growth.tokens if token.wanted])


@pytest.mark.parametrize("kind", ["characters", "unigram"])
@pytest.mark.parametrize("gap", [0, 5])
def test_tokenizer_model_gives_the_same_ids(tmp_path, kind, gap):
    import sentencepiece

    growth = grow(OLD[kind], [*PIECES, "▁你好"], num_ids(OLD[kind]) + gap)
    growth.write(FOLDERS[kind], tmp_path)
    data = (FOLDERS[kind] / "tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer.model").read_bytes().startswith(data)
    other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert other.get_piece_size() == growth.num_ids
    again = AutoTokenizer.from_pretrained(tmp_path)
    first = num_ids(OLD[kind])
    for text in [*ENGLISH, CHINESE, f"好 {CHINESE} 你好 x", *PIECES, f"x<unused_{first}> x{first}", "龘😀ß"]:
        assert other.encode(text) == again(text, add_special_tokens=False)["input_ids"], text
        assert other.decode(other.encode(text)) == text
    scores = [other.get_score(token.id) for token in growth.tokens]
    if kind == "characters":
        old = [piece.score for piece in sp_model.read_pieces(data) if piece.type == sp_model.NORMAL]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores) and max(scores) < min(old)


def test_unigram_scores_are_exact_in_both_libraries(tmp_path):
    """Where many ways to cut a word are nearly as good, sums rounded otherwise would choose otherwise."""
    import sentencepiece

    from danlu.tokens.train import Options, train_tokenizer

    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("abcde", k=draw.randint(1, 7))) for _ in range(30)) for _ in range(200)]
    (tmp_path / "old").mkdir()
    old = train_tokenizer(texts, Options("unigram", 400), tmp_path / "old")
    pieces = ["".join(draw.choices("abcde", k=draw.randint(3, 9))) for _ in range(60)]
    growth = grow(old, [*pieces, "aaaa", "aaaaa", "abab", "babab", "aaab"], num_ids(old))
    growth.write(tmp_path / "old", tmp_path / "new")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    for _ in range(1500):
        text = "".join(draw.choice(["aa", "ab", "aaa", "a", "b", "bb", "ba"]) * draw.randint(1, 4) for _ in range(10))
        assert ids(growth.backend, text) == model.encode(text), text


def test_pieces_behind_a_blank_that_begins_every_text_are_reached():
    old = Tokenizer(models.BPE())
    old.pre_tokenizer, old.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    old.train_from_iterator([*ENGLISH, "one two three"], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert grow(old, ["世界", "▁世界", "人工智能"], num_ids(old)).unreached == []


def test_scores_stay_apart_below_large_ones(tmp_path):
    """Mistral's model ends with runs of blanks at -1e9, where float32 has steps of 64."""
    data = (FOLDERS["characters"] / "tokenizer.model").read_bytes()
    pieces = sp_model.read_pieces(data)
    source = tmp_path / "old"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(sp_model.append_pieces(data, [sp_model.Piece("▁▁▁▁▁▁▁", -1e9)]))
    growth = grow(OLD["characters"], PIECES, len(pieces) + 1)
    names = growth.old.vocabulary | {"▁▁▁▁▁▁▁": len(pieces)}
    vars(growth.old)["vocabulary"] = names
    growth.write(source, tmp_path / "new")
    written = sp_model.read_pieces((tmp_path / "new/tokenizer.model").read_bytes())
    scores = [piece.score for piece in written[-len(growth.tokens):]]
    assert len(set(scores)) == len(scores) and max(scores) < -1e9
    vars(growth.old).pop("vocabulary")


def test_a_model_file_of_another_tokenizer_is_named(tmp_path):
    growth = GROWN["characters"]
    data = (FOLDERS["characters"] / "tokenizer.model").read_bytes()
    count = len(sp_model.read_pieces(data))
    (tmp_path / "tokenizer.model").write_bytes(sp_model.keep_pieces(data, [0, 1, 2, *range(280, count)]))
    with pytest.raises(ConfigError, match="says that token 3 is"):
        growth.write(tmp_path, tmp_path / "new")
    with pytest.raises(DataError, match="no SentencePiece model"):
        sp_model.read_pieces(b"\xff\xff not one")
    with pytest.raises(DataError, match="cut off"):
        sp_model.read_pieces(data[:-7])


@pytest.mark.parametrize("piece,reason", [
    ("", "empty"), ("  ", "blank"), ("a\nb", "holds a line end"), (" 你好", "a blank at an end"),
    ("你好　", "a blank at an end"), ("你\u200b好", "holds a zero-width character"),
    ("\ufeff你", "holds a zero-width character"),
    ("ＡＢＣ", "full-width letters or digits"), ("\ue000", "holds a private-use character"), ("\ufffd", "holds U+FFFD"),
    ("\x1b[31m", "holds a control character"), ("，", None), ("▁你好", None), ("人工智能", None)])
def test_faults_of_pieces(piece, reason):
    found = fault_of(piece)
    assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_cannot_be_are_refused_with_a_reason(kind):
    special = "<|endoftext|>" if kind == "bytes" else "</s>"
    asked = ["你好", "你好", "q", special, f"a{special}b", "", "好人好人好人", "生命", "龘"]
    growth = grow(OLD[kind], asked, num_ids(OLD[kind]), num_pieces=2, max_length=5)
    reasons = dict(growth.refused)
    assert reasons == {1: "repeated", 2: "already in the vocabulary", 3: "already in the vocabulary",
                       4: "spells a special token", 5: "empty", 6: "too long", 8: "beyond num_pieces"}
    assert sum(token.wanted for token in growth.tokens) == 2


def test_what_normaliser_and_splitter_make_unreachable():
    spelling = Spelling(OLD["bytes"])
    assert spelling.why_not("你好，世界") == "the tokenizer splits it"
    assert spelling.why_not("cafe\u0301") == "the tokenizer's normaliser changes it"
    assert spelling.why_not("▁你好") is None
    growth = grow(OLD["bytes"], ["▁你好"], 400)
    assert ids(growth.backend, "x 你好")[-1] == 399 + len(growth.tokens)
    assert growth.backend.decode(ids(growth.backend, "x 你好")) == "x 你好"


def test_a_part_that_is_an_old_token_without_merges():
    """A vocabulary may hold tokens that no merge makes. New merges never give them; a piece that needs one is refused."""
    spec = json.loads(OLD["bytes"].to_str())
    token = GROWN["bytes"].old.token
    spec["model"]["vocab"] |= {"xy": 340, "yz": 341, token("龙凤"): 342}
    old = Tokenizer.from_str(json.dumps(spec))
    growth = grow(old, ["龙凤", "xyz", "龙凤呈", "你好"], 343)
    assert growth.refused == [(0, "already in the vocabulary"), (1, "a part of it is an old token that no merge reaches")]
    assert growth.unreached == [] and all(old.token_to_id(token.token) is None for token in growth.tokens)
    merges = json.loads(growth.backend.to_str())["model"]["merges"]
    assert not {"xy", "yz", token("龙凤")} & {left + right for left, right in merges}
    assert growth.num_ids == 343 + len(growth.tokens)
    assert "凤呈" in [growth.old.text(token.token) for token in growth.tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_is_replaced(kind, tmp_path):
    old = OLD[kind]
    known = next(token for token in sorted(old.get_vocab()) if len(token) > 1 and token.isascii() and token.isalpha())
    asked = [*PIECES, "▁the", "quick", known]
    growth = grow(old, asked, num_ids(old), replace=True)
    names = {id: token for token, id in old.get_vocab().items()}
    assert growth.kept == kept_ids(Spelling(old)) and growth.first_id == len(growth.kept)
    assert growth.num_ids < num_ids(old) + len(PIECES)
    vocabulary = growth.backend.get_vocab()
    assert all(vocabulary[names[old_id]] == id for id, old_id in enumerate(growth.kept))
    sources = growth.sources()
    assert len(sources) == growth.num_ids == max(vocabulary.values()) + 1
    # A token that the old vocabulary had too is a copy of its row.
    assert sources[vocabulary[known]] == (old.get_vocab()[known],)
    text = f"The quick fox {CHINESE} 😀 12"
    assert growth.backend.decode(ids(growth.backend, text)) == text
    assert growth.unreached == []
    growth.write(FOLDERS[kind], tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text, add_special_tokens=False)["input_ids"] == ids(growth.backend, text)
    assert again.eos_token_id == growth.kept.index(AutoTokenizer.from_pretrained(FOLDERS[kind]).eos_token_id)
    if kind != "bytes":
        import sentencepiece

        other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        assert other.encode(text) == ids(growth.backend, text)


def test_added_tokens_have_their_new_ids_in_the_older_files_too(tmp_path):
    """llama.cpp's converter and slow tokenizers read them there."""
    (source := tmp_path / "source").mkdir()
    eos, pad = "<|endoftext|>", "<|pad|>"
    named = {OLD["bytes"].token_to_id(name): {"content": name, "special": True} for name in (eos, pad)}
    (source / "added_tokens.json").write_text(json.dumps({entry["content"]: id for id, entry in named.items()}))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "added_tokens_decoder": named}))
    growth = grow(OLD["bytes"], PIECES, num_ids(OLD["bytes"]), replace=True)
    growth.write(source, tmp_path / "grown")
    found = {name: growth.backend.token_to_id(name) for name in (eos, pad)}
    assert set(found.values()).isdisjoint(named) and json.loads((tmp_path / "grown/added_tokens.json").read_text()) == found
    config = json.loads((tmp_path / "grown/tokenizer_config.json").read_text())
    assert {entry["content"]: int(id) for id, entry in config["added_tokens_decoder"].items()} == found
    assert config["eos_token"] == eos


def test_kinds_that_cannot_grow():
    with pytest.raises(ConfigError, match="WordPiece"):
        Spelling(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match="BPE"):
        Spelling(Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")))


@pytest.mark.parametrize("kind", KINDS)
def test_learned_pieces(kind):
    texts = ["人工智能和人工智能，你好。The quick brown fox 你好 the zebra zebra zebra。"] * 20 + ["偶然"]
    learned = learn_pieces(OLD[kind], texts, 40, min_count=10)
    assert {"人工智能", "你好"} <= set(learned) and "偶然" not in learned
    assert all(max(piece) > "\x7f" and min(piece) > "\x7f" for piece in learned)
    # What saves most comes first: two tokens for each of 40 characters, 20 joins for each of 20 words.
    assert learned[:4] == ["人", "工", "智", "能"] and learned.index("人工智能") < learned.index("和人工智能")
    growth = grow(OLD[kind], learned, num_ids(OLD[kind]))
    assert growth.refused == [] and growth.unreached == []
    assert [ids(growth.backend, text) for text in ENGLISH[:3]] == [ids(OLD[kind], text) for text in ENGLISH[:3]]
    assert learn_pieces(OLD[kind], texts, 3, min_count=10) == learned[:3]
    every = learn_pieces(OLD[kind], texts, 60, min_count=10, ascii=True)
    assert any("zebra" in piece for piece in every)
    assert "▁zebra" in every or kind != "bytes"
    with pytest.raises(DataError, match="all of it is ASCII"):
        learn_pieces(OLD[kind], ENGLISH[:2], 10)


def test_the_worked_example_of_a_grown_vocabulary():
    rows = [json.loads(line) for line in ('{"piece": "你好"}', '{"piece": "人工智能"}')]
    for kind, old in OLD.items():
        growth = grow(old, [row["piece"] for row in rows], num_ids(old))
        assert [growth.old.text(token.token) for token in growth.tokens if token.wanted] == ["你好", "人工智能"], kind


def test_a_unigram_model_without_an_unknown_token_gets_no_new_characters() -> None:
    old = Tokenizer(models.Unigram([("\u2581", -1.0), ("a", -2.0), ("b", -2.0)], unk_id=None))
    growth = grow(old, ["ab", "\u4f60"], 3)
    assert [token.token for token in growth.tokens] == ["ab"]
    assert growth.refused == [(1, "the tokenizer has no token for a character that it does not know")]
