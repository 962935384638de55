"""What is shown is what is learned."""

import io

import numpy as np
import pytest
from rich.console import Console

from danlu.core.examples import Branch, Example
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue
from danlu.tokens.encode import Encoder
from danlu.tokens.show import headline, show_example, split_pieces, targets_text, visible
from tokens.samples import CHATML, make_tokenizer, talk


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(str(tmp_path_factory.mktemp("tokenizer")), CHATML, "<|im_end|>")


@pytest.fixture
def example(tokenizer):
    encoder = Encoder(tokenizer, 200)
    return encoder.dialogue(Dialogue(talk("问 🙂", "答 🙂", "b", "c"), "file", "file:7"), Ledger())[0]


def paint(renderable):
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="256")
    console.print(renderable)
    return console.file.getvalue()


def plain(renderable):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_the_whole_example_is_shown(example, tokenizer):
    text = plain(show_example(example, tokenizer))
    assert text.splitlines()[0].rstrip() == \
        f"file:7 (file, chat): {example.num_tokens} tokens, {example.num_targets} learned"
    assert "<|im_start|>assistant⏎\n答 🙂<|im_end|>⏎\n<|im_start|>user⏎\nb<|im_end|>" in text
    assert "learned: 答 🙂<|im_end|> … c<|im_end|>" in text


def test_targets(example, tokenizer):
    assert targets_text(example.branches[0], tokenizer) == "答 🙂<|im_end|> … c<|im_end|>"


def test_colours_tell_context_from_learned(example, tokenizer):
    shown = paint(show_example(example, tokenizer))
    assert "\x1b[38;5;244muser\x1b[0m" in shown or "\x1b[38;5;244mu" in shown
    assert any(f"\x1b[1;{code}m🙂" in shown or f"\x1b[1;{code}m 🙂" in shown for code in (32, 36))


def test_stem_branches_and_prices(tokenizer):
    ids = tokenizer("What is the capital?", add_special_tokens=False).input_ids
    example = Example(ids, (Branch(ids[:3]), Branch(ids[:2])), "s", "c", "book#2")
    bits = [np.array([1.0, 2.0, np.nan]), np.array([0.5, 9.0])]
    assert "piece 2" in headline(example) and "2 branches" in headline(example)
    text = plain(show_example(example, tokenizer, bits))
    assert "stem: What is the capital?" in text
    assert "branch 0:" in text and "branch 1:" in text
    assert "2 learned tokens, 3.0 bits, 1.500 bits a token" in " ".join(text.split())
    assert "9.00" in paint(show_example(example, tokenizer, bits))


def test_pieces_are_the_tokens(example, tokenizer):
    branch = example.branches[0]
    found = list(split_pieces(branch.tokens, branch.weights, tokenizer, np.ones(len(branch.tokens))))
    assert [piece.start for piece in found[1:]] == [piece.end for piece in found[:-1]]
    assert sum(piece.bits for piece in found) == len(branch.tokens)
    assert "".join(piece.text for piece in found) == tokenizer.decode(branch.tokens)


def test_broken_characters_are_shown_and_end(tokenizer):
    ids = tokenizer("🙂", add_special_tokens=False).input_ids[:-1]
    assert [piece.text for piece in split_pieces(np.array(ids), np.ones(len(ids)), tokenizer, None)]


def test_control_characters_cannot_reach_the_terminal():
    assert visible("a\x1b[2Jb\x07\tc\n") == "a␛[2Jb␇→c⏎\n"


def test_weights_but_one_are_shown(tokenizer):
    ids = tokenizer("What is the capital?", add_special_tokens=False).input_ids
    weights = np.ones(len(ids), np.float32)
    weights[:1], weights[-1:] = 0, 0.5
    text = targets_text(Branch(ids, weights), tokenizer)
    assert text == f"{tokenizer.decode(ids[1:-1])} … ×0.5 {tokenizer.decode(ids[-1:])}"
    assert targets_text(Branch([]), tokenizer) == ""
