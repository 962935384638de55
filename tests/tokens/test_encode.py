"""Every token is learned exactly once, or the ledger says why not; with the worked examples of the field's texts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Document, Message
from danlu.tokens.encode import Encoder, keep_turns, pieces, split_turns, weights_from_spans
from tokens.samples import (
    BRACKETS,
    CHATML,
    HEADERS,
    NO_END,
    TEXT,
    dialogue,
    learned_text,
    make_tokenizer,
    make_words,
    talk,
)

# Dialogues whose words are their ids: <s> question answer </s>
PAIR = "{{ bos_token }}{% for m in messages %}{{ ' ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}\
{% endif %}{% endfor %}"
# <s> 9 9 50 <s> question </s> 51 <s> answer </s>
MARKED = "{{ '<s> 9 9' }}{% for m in messages %}{{ (' 50' if m['role'] == 'user' else ' 51') + '<s>' + m['content'] + \
'</s>' }}{% endfor %}{% if add_generation_prompt %}{{ ' 51<s>' }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokenizer"))


def one(examples):
    [example] = examples
    [branch] = example.branches
    assert len(example.stem) == 0
    return branch.tokens.tolist(), branch.weights.astype(int).tolist()


# The worked examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["<s>", None])
def test_documents_101_102_and_103_to_106_in_blocks_of_4_lose_nothing(bos):
    encoder, ledger = Encoder(make_words(bos=bos), 4), Ledger()
    documents = [Document("101 102", "s", "1"), Document("103 104 105 106", "s", "2")]
    learned = []
    for example in encoder.documents(documents, ledger):
        assert example.num_tokens <= 4
        learned += example.branches[0].tokens[example.branches[0].weights > 0].tolist()
    assert learned == [101, 102, 2, 103, 104, 105, 106, 2]
    ledger.check()


def test_pieces_without_special_tokens_hold_every_token():
    found = [pieces(np.array(tokens), 4) for tokens in ([101, 102], [103, 104, 105, 106])]
    assert [[piece.tolist() for piece, _ in row] for row in found] == [[[101, 102]], [[103, 104, 105, 106]]]


def test_source_101_102_target_201_202_203():
    tokens, weights = one(Encoder(make_words(PAIR), 10).dialogue(dialogue("101 102", "201 202 203"), Ledger()))
    assert tokens == [1, 101, 102, 201, 202, 203, 2]
    assert weights == [0, 0, 0, 1, 1, 1, 1]
    offsets = np.array([[0, 3], [4, 7], [8, 11], [12, 15], [16, 19]])
    labels = np.where(weights_from_spans(offsets, [(8, 19)]) > 0, [101, 102, 201, 202, 203], -100)
    assert labels.tolist() == [-100, -100, 201, 202, 203]


def test_a_turn_that_does_not_fit_4_tokens_is_dropped_and_counted():
    ledger = Ledger()
    assert Encoder(make_words(PAIR), 4).dialogue(dialogue("101 102", "201 202 203"), ledger) == []
    assert ledger.stations["overlong"].dropped["no turn fits cutoff_len"].to_json() == {
        "rows": 1, "bytes": 0, "tokens": 7}
    ledger.check()


def test_2_5_6_1_8_7_6_has_7_targets_with_the_end_token():
    tokens, weights = one(Encoder(make_words(), 10).document(Document("201 5 6 300 8 7 6", "s", "1"), Ledger()))
    assert tokens == [1, 201, 5, 6, 300, 8, 7, 6, 2]
    assert weights == [0] + [1] * 8
    tokens, weights = one(Encoder(make_words(bos=None), 10).document(Document("5 6 300 8 7 6", "s", "1"), Ledger()))
    assert tokens == [2, 5, 6, 300, 8, 7, 6, 2]
    assert sum(weights) == 7


def test_prompt_11_12_13_answer_21_22_learns_21_22_and_eos():
    tokens, weights = one(Encoder(make_words(PAIR), 10).dialogue(dialogue("11 12 13", "21 22"), Ledger()))
    assert tokens == [1, 11, 12, 13, 21, 22, 2]
    assert weights == [0, 0, 0, 0, 1, 1, 1]


def test_a_bos_before_the_answer_is_not_learned():
    tokens, weights = one(Encoder(make_words(MARKED), 20).dialogue(dialogue("60", "70 71"), Ledger()))
    assert tokens == [1, 9, 9, 50, 1, 60, 2, 51, 1, 70, 71, 2]
    assert weights == [0] * 9 + [1, 1, 1]


def test_source_and_target_pairs_learn_the_target_and_eos():
    assert one(Encoder(make_words(PAIR), 20).dialogue(dialogue("31 32", "33 34"), Ledger()))[1] == [0, 0, 0, 1, 1, 1]
    assert one(Encoder(make_words(PAIR), 20).dialogue(dialogue("", "33 34"), Ledger()))[1] == [0, 1, 1, 1]


def test_three_turns_ending_at_50_80_120():
    assert keep_turns([50, 80, 120], 101) == 2
    assert keep_turns([50, 80, 120], 41) == 0
    assert keep_turns([50, 80, 120], 120) == 3


def test_whole_turns_are_kept_up_to_the_limit():
    def words(count):
        return " ".join(["7"] * count)

    talked = dialogue(words(20), words(28), words(20), words(9), words(20), words(19))  # ends at 50, 80, 120
    for limit, expected in ((101, 80), (41, None), (120, 120)):
        ledger = Ledger()
        examples = Encoder(make_words(PAIR), limit).dialogue(talked, ledger)
        assert [example.num_tokens for example in examples] == ([expected] if expected else [])
        ledger.check()
    ledger = Ledger()
    Encoder(make_words(PAIR), 101).dialogue(talked, ledger)
    assert ledger.stations["overlong"].dropped["turns beyond cutoff_len"].tokens == 40


def test_the_end_token_of_an_alpaca_row_is_learned_though_it_is_the_padding(folder):
    tokenizer = make_tokenizer(folder, CHATML, "<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    tokens, weights = one(Encoder(tokenizer, 200).dialogue(
        dialogue("Give three tips for staying healthy.", "1.Eat a balanced diet."), Ledger()))
    end = tokenizer.eos_token_id
    assert [weight for token, weight in zip(tokens, weights) if token == end] == [0, 1]


# Documents -----------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 60), cutoff=st.integers(2, 9))
def test_pieces_learn_every_token_but_the_first_once(count, cutoff):
    tokens = np.arange(count)
    found = pieces(tokens, cutoff)
    learned = np.concatenate([piece[weights > 0] for piece, weights in found])
    assert learned.tolist() == list(range(1, count))
    assert all(len(piece) <= cutoff for piece, _ in found)
    assert all(after[0] == before[-1] for (before, _), (after, _) in pairwise(found))
    assert all(weights.any() for _, weights in found) or count == 1


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6),
       cutoff=st.integers(2, 20))
def test_documents_come_back_from_what_is_learned(folder, texts, cutoff):
    encoder, ledger = Encoder(make_tokenizer(folder, None), cutoff), Ledger()
    learned: dict[str, list[int]] = {}
    for example in encoder.documents([Document(text, "s", str(i)) for i, text in enumerate(texts)], ledger):
        branch = example.branches[0]
        learned.setdefault(example.id.partition("#")[0], []).extend(branch.tokens[branch.weights > 0].tolist())
    ledger.check()
    end = encoder.tokenizer.eos_token_id
    for i, text in enumerate(texts):
        if text:
            assert learned[str(i)][-1] == end
            assert encoder.codec.decode(learned[str(i)][:-1]) == text
    total = sum(len(text.encode()) for text in texts)
    assert ledger.station("tokenize").came.bytes == total


def test_long_documents_in_chunks_give_the_same_tokens(folder):
    encoder = Encoder(make_tokenizer(folder, None), 10_000_000)
    text = "What is it?\n\nA line of text.\n  more 12\n" * 4000
    [example] = encoder.document(Document(text, "s", "1"), Ledger())
    assert example.branches[0].tokens[1:-1].tolist() == encoder.codec.plain.encode(text).ids


def test_provenance_of_pieces():
    examples = Encoder(make_words(), 3).document(Document("5 6 7", "book", "chapter", "zh"), Ledger())
    assert [(x.source, x.category, x.id) for x in examples] == [("book", "zh", "chapter"), ("book", "zh", "chapter#2")]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = make_words()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Encoder(tokenizer, 8).check(dialogues=False)
    with pytest.raises(ConfigError, match="cutoff_len"):
        Encoder(make_words(), 1)


# Dialogues -----------------------------------------------------------------------------------------------------------


def test_characters_of_several_tokens_are_learned_whole(folder):
    encoder = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 400)
    [example] = encoder.dialogue(dialogue("🙂 问", "答 🙂🐉 é\n\n  x"), Ledger())
    branch = example.branches[0]
    assert encoder.codec.decode(branch.tokens[branch.weights > 0]) == "答 🙂🐉 é\n\n  x<|im_end|>"


@pytest.mark.parametrize(("learn", "expected"), [
    ("assistant", "Hello.<|im_end|>Enough.<|im_end|>"), ("last", "Enough.<|im_end|>"),
    ("all", "user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n"
            "<|im_start|>assistant\nEnough.<|im_end|>\n")])
def test_what_is_learned(folder, learn, expected):
    encoder = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 400, learn=learn)
    [example] = encoder.dialogue(dialogue("Hi?", "Hello.", "More?", "Enough."), Ledger())
    branch = example.branches[0]
    assert encoder.codec.decode(branch.tokens[branch.weights > 0]) == expected


LONG = (["Hi?", "Hello.", "More?", "x" * 60, "And?", "Enough.", "So?", "Yes."], "Be kind.")


@pytest.mark.parametrize(("overlong", "expected"), [
    ("turns", ["Hello.<|im_end|>"]), ("drop", []), ("split", ["Hello.<|im_end|>", "Enough.<|im_end|>Yes.<|im_end|>"])])
def test_policies_for_long_dialogues(folder, overlong, expected):
    encoder, ledger = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 60, overlong), Ledger()
    examples = encoder.dialogue(dialogue(*LONG[0], system=LONG[1]), ledger)
    assert learned_text(encoder, examples) == expected
    assert all(x.num_tokens <= 60 and encoder.codec.decode(x.branches[0].tokens).startswith("<|im_start|>system")
               for x in examples)
    ledger.check()
    station = ledger.stations["overlong"]
    assert station.came.rows == 1
    assert station.went.tokens == sum(x.num_tokens for x in examples)
    reasons = {"turns": "turns beyond cutoff_len", "drop": "longer than cutoff_len",
               "split": "turns longer than cutoff_len"}
    assert station.dropped[reasons[overlong]].tokens > 0


def test_cutting_tokens_learns_no_end(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 90, "tokens"), Ledger()
    [example] = encoder.dialogue(dialogue(*LONG[0]), ledger)
    assert example.num_tokens == 90
    assert learned_text(encoder, [example])[0].startswith("Hello.<|im_end|>xxx")
    assert not learned_text(encoder, [example])[0].endswith("<|im_end|>")
    ledger.check()


def test_cutting_tokens_before_any_answer_leaves_nothing_to_learn(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 8, "tokens"), Ledger()
    assert encoder.dialogue(dialogue("Hi? " * 20, "Hello."), ledger) == []
    assert ledger.stations["learn"].dropped["nothing to learn"].to_json() == {"rows": 1, "bytes": 0, "tokens": 8}
    ledger.check()


def test_error_names_the_row(folder):
    with pytest.raises(DataError, match="f:1: the dialogue has"):
        Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 60, "error").dialogue(dialogue(*LONG[0]), Ledger())


def test_a_last_question_without_answer_is_left_out_and_counted(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 400), Ledger()
    [example] = encoder.dialogue(dialogue("Hi?", "Hello.", "More?"), ledger)
    assert encoder.codec.decode(example.branches[0].tokens).endswith("Hello.<|im_end|>\n")
    assert ledger.stations["render"].dropped["no answer follows"].bytes == len("More?")
    ledger.check()


def test_rows_without_answer_or_refused_by_the_template_are_kept_in_the_quarantine(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, BRACKETS, "</s>"), 400), Ledger()
    twice = Dialogue((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), "f", "f:2")
    assert list(encoder.dialogues([dialogue("Hi?"), twice, dialogue("Hi?", "Hello.", id="f:3")], ledger)) != []
    assert [item.where for item in ledger.quarantined] == ["f:1", "f:2"]
    assert {reason: count.rows for reason, count in ledger.stations["render"].dropped.items()} == {
        "no answer": 1, "refused by the chat template": 1}
    ledger.check()


def test_a_row_whose_special_token_cannot_be_kept_as_text_is_dropped_and_counted():
    """The words tokenizer cannot be cut, so </s> in a user's mouth would become the real one."""
    encoder, ledger = Encoder(make_words(PAIR), 20), Ledger()
    assert not encoder.codec.can_cut
    [kept] = encoder.dialogues([dialogue("101 </s> 102", "201", id="f:1"), dialogue("101", "201", id="f:2")], ledger)
    assert kept.id == "f:2"
    assert ledger.stations["render"].dropped["spells a special token"].rows == 1
    assert [(item.where, item.reason) for item in ledger.quarantined] == [("f:1", "spells a special token")]
    ledger.check()


def test_a_template_without_spans_names_the_row(folder):
    with pytest.raises(ConfigError, match=r"f:1: .*assistant spans cannot be found"):
        Encoder(make_tokenizer(folder, NO_END), 400).dialogue(dialogue("Hi?", "Hello."), Ledger())


def test_learned_tokens_are_what_the_ledger_says(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, HEADERS, "<|eot_id|>"), 60), Ledger()
    talks = [dialogue(f"Hi {i}?", "Hello." * (i % 5 + 1), id=f"f:{i}") for i in range(40)]
    examples = list(encoder.dialogues(talks, ledger))
    station = ledger.stations["learn"]
    assert station.went.tokens == sum(x.num_targets for x in examples)
    assert station.came.tokens == sum(x.num_tokens for x in examples)
    assert station.dropped["first token"].tokens == station.went.rows == len(examples)
    ledger.check()
    assert list(ledger.stations) == ["render", "tokenize", "overlong", "learn"]


def test_batches_give_what_single_rows_give(folder, monkeypatch):
    monkeypatch.setattr("danlu.tokens.encode.BATCH_ROWS", 3)
    encoder = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 60, "split")
    talks = [dialogue(*LONG[0][:2 * (i % 4) + 2], id=f"f:{i}") for i in range(11)]
    together = list(encoder.dialogues(talks, Ledger()))
    apart = [example for talked in talks for example in encoder.dialogue(talked, Ledger())]
    assert [x.id for x in together] == [x.id for x in apart]
    for a, b in zip(together, apart):
        assert np.array_equal(a.branches[0].tokens, b.branches[0].tokens)
        assert np.array_equal(a.branches[0].weights, b.branches[0].weights)


def test_weights_from_spans():
    offsets = np.array([[0, 2], [2, 4], [4, 4], [4, 6], [6, 9], [9, 9]])
    assert weights_from_spans(offsets, [(2, 5)]).tolist() == [0, 1, 1, 1, 0, 0]
    assert weights_from_spans(offsets, [(0, 2), (8, 9)]).tolist() == [1, 0, 0, 0, 1, 0]
    assert weights_from_spans(offsets, []).tolist() == [0] * 6


def test_split_turns():
    messages = [Message("system", "s"), *talk("a", "b", "c", "d")]
    head, turns = split_turns(messages)
    assert head == messages[:1]
    assert turns == [messages[1:3], messages[3:5]]


# The self-test -------------------------------------------------------------------------------------------------------


def test_check_accepts_good_templates(folder):
    for template, eos in ((CHATML, "<|im_end|>"), (HEADERS, "<|eot_id|>"), (BRACKETS, "</s>")):
        Encoder(make_tokenizer(folder, template, eos), 64).check()


def test_check_refuses_two_bos(folder):
    with pytest.raises(ConfigError, match="two BOS"):
        Encoder(make_tokenizer(folder, "{{ bos_token }}" + HEADERS, "<|eot_id|>"), 64).check()


def test_check_refuses_a_vocabulary_that_loses_text():
    with pytest.raises(ConfigError, match="loses text"):
        Encoder(make_words(PAIR), 64).check()


def test_a_bos_that_the_tokenizer_would_add_is_not_added(folder):
    tokenizer = make_tokenizer(folder, HEADERS, "<|eot_id|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[
        ("<s>", tokenizer.bos_token_id)])
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    encoder = Encoder(tokenizer, 64)
    encoder.check()
    [example] = encoder.dialogue(dialogue("Hi?", "Hello."), Ledger())
    assert example.branches[0].tokens.tolist().count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_writes_spaces_as_marks_learns_the_answer_and_its_end():
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = BRACKETS
    encoder = Encoder(tokenizer, 400)
    assert not encoder.codec.can_cut
    [example] = encoder.dialogue(dialogue("What is France?", "The answer is Paris.", "why?", "say why"), Ledger())
    branch = example.branches[0]
    learned = encoder.codec.decode(branch.tokens[branch.weights > 0])
    assert "".join(learned.split()) == "TheanswerisParis.</s>saywhy</s>"
    assert branch.tokens[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(("template", "message"), [
    (NO_END, "the end of a turn would never be learned"),
    ("{% for m in messages %}{{ m.content + m.content + '<|im_end|>' }}{% endfor %}", "exactly once"),
    ("{{ bos_token }}{{ bos_token }}" + CHATML, "two BOS"),
    (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"), "does not go on from the prompt"),
    ("{{ raise_exception('never') }}", "never")])
def test_the_self_test_refuses_what_would_go_wrong(folder, template, message):
    with pytest.raises(ConfigError, match=message):
        Encoder(make_tokenizer(folder, template, "<|im_end|>"), 64).check()


def test_the_self_test_compares_the_prompt_with_the_row(folder, monkeypatch):
    encoder = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 64)
    encoder.check()
    monkeypatch.setattr(type(encoder.chat), "prompt_ids", lambda self, messages: [1, 2, 3])
    with pytest.raises(ConfigError, match="tokenised otherwise"):
        encoder.check()
