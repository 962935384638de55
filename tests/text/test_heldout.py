"""What a recipe holds out by name is held out, whatever copies of it stand before it."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.text.corpus import read_corpus

RECIPE = """
name: held
steps:
  corpus: {stage: corpus, sources: [{path: texts/}], heldout: ["texts/z*"], heldout_share: 0, workers: 1%s}
"""
WORDS = np.array(["copper", "river", "seven", "garden", "letter", "cloud", "winter", "stone", "engine", "lamp", "boat"])


@pytest.mark.parametrize("keys", ["", ", near_dedup: {}", ", dedup_paragraphs: true"])
def test_no_copy_of_a_named_text_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, 80)) for _ in range(8)]
    Path("texts").mkdir()
    near = [text.replace("lamp", "lantern", 1) for text in texts]
    for name, rows in (("a", [*texts[:4], *near[4:], "something else that stays " * 9]), ("z", texts)):
        Path(f"texts/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    made = run(Recipe.from_text(RECIPE % keys, base=tmp_path), tmp_path / "runs", console=Console(quiet=True))
    folder = made["corpus"].folder
    trained = [document.text for document in read_corpus(folder, "train")]
    assert [document.text for document in read_corpus(folder, "heldout")] == texts
    assert len(trained) == (1 if "near" in keys else 5) and not set(trained) & set(texts)
