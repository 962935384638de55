"""Fake stages, a folder to work in, and a recipe of three steps."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_stages

from danlu.pipeline.stages import STAGES

RECIPE = """\
name: demo
seed: 3
steps:
  corpus:
    stage: words
    dataset: [texts]
  base:
    stage: count
    dataset: corpus
    learning_rate: 1e-3
  report:
    stage: note
    model: base
"""


@pytest.fixture
def stages(monkeypatch):
    """Only the fake stages exist; the names of the steps that ran are in the list."""
    kept = dict(STAGES)
    fake_stages.register(STAGES)
    fake_stages.RAN.clear()
    yield fake_stages.RAN
    STAGES.clear()
    STAGES.update(kept)


@pytest.fixture
def folder(tmp_path, monkeypatch, stages):
    """A folder with texts and a recipe, and the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one two\nthree\na bad line\n")
    (tmp_path / "texts" / "b.txt").write_text("four\n")
    (tmp_path / "demo.yaml").write_text(RECIPE)
    return tmp_path
