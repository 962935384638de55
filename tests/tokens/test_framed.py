"""Framed pieces: nothing is lost, words and sentences are told apart."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.tokens.denoise import SENTENCE, WORD
from danlu.tokens.framed import SENTENCE_END, FramedEncoder
from tokens.samples import make_tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "the", "cat", "sat", ".", "!", "使", "用",
          "语", "言", "模", "型", "来", "。"]


def bert_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                           special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")


def encode(text: str, cutoff_len: int = 32, **options: object) -> tuple[list, Ledger]:
    ledger = Ledger()
    encoder = FramedEncoder(bert_tokenizer(), cutoff_len, **options)
    found = list(encoder.documents([Document(text, "s", "d")], ledger))
    ledger.check()
    return found, ledger


@pytest.mark.parametrize("cutoff_len", [3, 4, 5, 9, 32])
def test_every_token_is_in_exactly_one_piece(cutoff_len: int) -> None:
    text = "the unaffable cat sat. the cat! " * 2
    found, _ = encode(text, cutoff_len, words="own", sentences=True)
    [whole] = encode(text, 200)[0]
    content = np.concatenate([example.branches[0].tokens[1:-1] for example in found])
    assert content.tolist() == whole.branches[0].tokens[1:-1].tolist()
    for example in found:
        [branch] = example.branches
        assert len(branch.tokens) <= cutoff_len and branch.tokens[0] == 2 and branch.tokens[-1] == 3
        assert branch.weights.tolist() == [0, *[1] * (len(branch.tokens) - 2), 0]
        assert branch.columns[WORD][[0, -1]].tolist() == [-1, -1] and branch.columns[WORD][1] == 0
    assert [example.id for example in found][:2] == (["d", "d#2"] if len(found) > 1 else ["d"])


def test_words_are_those_of_the_pre_tokenizer() -> None:
    [example] = encode("The unaffable cat.", words="own")[0]
    assert example.branches[0].tokens.tolist() == [2, 8, 5, 6, 7, 9, 11, 3]
    assert example.branches[0].columns[WORD].tolist() == [-1, 0, 1, 1, 1, 2, 3, -1]


def test_chinese_words_are_those_of_jieba() -> None:
    pytest.importorskip("jieba")
    [example] = encode("使用语言模型来 unaffable。", words="jieba")[0]  # the example of Cui et al. 2019, table 1
    assert example.branches[0].columns[WORD].tolist() == [-1, 0, 0, 1, 1, 2, 2, 3, 4, 4, 4, 5, -1]
    [alone] = encode("使用语言", words="own")[0]
    assert alone.branches[0].columns[WORD].tolist() == [-1, 0, 1, 2, 3, -1]


def test_a_run_of_chinese_is_no_word_without_a_splitter(tmp_path: Path) -> None:
    """SentencePiece's kinds begin words at blanks only, and byte-level splitters take a run of Han for one."""
    pieces = ["<unk>", "▁", "使", "用", "语言", "a", "b", "▁b"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - number) for number, piece in enumerate(pieces)], 0))
    backend.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="a", eos_token="b")
    [example] = FramedEncoder(tokenizer, 32, words="own").documents([Document("使用语言 ba", "s", "d")], Ledger())
    assert example.branches[0].columns[WORD].tolist() == [-1, 0, 1, 2, 3, 3, -1]
    tokenizer = make_tokenizer(str(tmp_path), None)
    [example] = FramedEncoder(tokenizer, 64, words="own").documents([Document("使用 the", "s", "d")], Ledger())
    words = example.branches[0].columns[WORD][1:-1]
    assert [int((words == word).sum()) for word in (0, 1)] == [3, 3], "the bytes of a character are one word"


def test_sentences_end_where_people_end_them() -> None:
    [example] = encode("the cat. the cat! 使用。来", sentences=True)[0]
    assert example.branches[0].columns[SENTENCE].tolist() == [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, -1]
    ends = [found.end() for found in SENTENCE_END.finditer('It is 3.5 m. “No!” he said… 好？”是。\nx')]
    assert ends == [12, 18, 27, 31, 33, 34]


def test_an_empty_document_is_counted() -> None:
    found, ledger = encode("")
    assert not found and ledger.station("tokenize").to_json()["dropped"]["empty document"]["rows"] == 1
