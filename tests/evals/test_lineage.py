"""Lineage: parents found by fingerprint, ledgers told, curves read."""

import json
from pathlib import Path

import pytest

from danlu.core.artifact import fresh_folder, publish
from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.evals.figures import PER_ANSWER, PER_PAIR, Curve
from danlu.evals.lineage import figures_in_words, loss_curves, trace, trained_context


def artifact(root: Path, step: str, kind: str, parents: dict[str, str], ledger: Ledger | None = None,
             stage: str = "pt", **settings: int) -> Path:
    fingerprint = (step.encode().hex() + "0" * 64)[:64]
    work = fresh_folder(root / step / ".work")
    (work / "data.txt").write_text(step)
    if ledger:
        ledger.save(work)
    publish(work, root / step / fingerprint[:8], kind=kind, fingerprint=fingerprint, parents=parents,
            config={"stage": stage, "settings": settings}, code="test",
            metrics={"num_rows": 1234, "loss": 2.34567, "name": "x", "good": True})
    return root / step / fingerprint[:8]


def fingerprint(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["fingerprint"]


def test_parents_come_first_and_once(tmp_path: Path) -> None:
    ledger = Ledger()
    station = ledger.station("read:texts")
    station.take(rows=10, bytes=100)
    station.drop("empty", rows=2, bytes=5)
    station.add("pieces", rows=1)
    station.give(rows=9, bytes=95)
    corpus = artifact(tmp_path, "corpus", "corpus", {"texts/": "f" * 64}, ledger)
    base = artifact(tmp_path, "base", "model", {"corpus": fingerprint(corpus)})
    chat = artifact(tmp_path, "chat", "model", {"base": fingerprint(base), "corpus": fingerprint(corpus)})
    steps, lines = trace([chat, base, tmp_path / "no-artifact"])
    assert [step.step for step in steps] == ["corpus", "base", "chat"]
    assert steps[0].parents == ["texts/ ffffffff"]
    assert steps[2].parents == [f"base {fingerprint(base)[:8]}", f"corpus {fingerprint(corpus)[:8]}"]
    assert steps[1].kind == "model" and steps[1].summary == "num_rows 1,234 · loss 2.346"
    [line] = lines
    assert (line.step, line.station, line.came["rows"], line.went["bytes"]) == ("corpus", "read:texts", 10, 95)
    assert line.changes == "+ pieces: 1 rows; − empty: 2 rows, 5 bytes"


def test_a_folder_of_the_same_name_but_another_fingerprint_is_no_parent(tmp_path: Path) -> None:
    corpus = artifact(tmp_path, "corpus", "corpus", {})
    base = artifact(tmp_path, "base", "model", {"corpus": fingerprint(corpus)[:8] + "1" * 56})
    assert [step.step for step in trace([base])[0]] == ["base"]


def test_the_trained_context_is_the_least_of_the_line(tmp_path: Path) -> None:
    corpus = artifact(tmp_path, "corpus", "corpus", {})
    base = artifact(tmp_path, "base", "model", {"corpus": fingerprint(corpus)}, cutoff_len=256)
    chat = artifact(tmp_path, "chat", "model", {"base": fingerprint(base)}, cutoff_len=512)
    assert trained_context(chat) == trained_context(base) == 256
    assert trained_context(corpus) is None and trained_context(tmp_path) is None
    for stage in ("dpo", "ppo", "rm"):
        aligned = artifact(tmp_path, stage, "model", {"chat": fingerprint(chat)}, cutoff_len=64, stage=stage)
        assert trained_context(aligned) == 256, "the length of a pair or a prompt is no limit of the model"


@pytest.mark.parametrize("content", ['{"name": "an extension", "version": 3}', "[1]"])
def test_a_manifest_of_another_program_says_nothing(tmp_path: Path, content: str) -> None:
    foreign = tmp_path / "downloads" / "model"
    foreign.mkdir(parents=True)
    (foreign / "manifest.json").write_text(content)
    assert trace([foreign]) == ([], []) and trained_context(foreign) is None
    base = artifact(tmp_path, "base", "model", {"corpus": "ab" * 32}, cutoff_len=64)
    beside = tmp_path / "other" / ("ab" * 4)
    beside.mkdir(parents=True)
    (beside / "manifest.json").write_text(content)
    assert [step.step for step in trace([base])[0]] == ["base"] and trained_context(base) == 64


def test_figures_are_numbers_only() -> None:
    assert figures_in_words({"a": None, "b": [1], "c": {"d": 1}, "e": False}) == ""
    assert figures_in_words({f"n{number}": number for number in range(20)}).count("·") == 5


def test_curves(tmp_path: Path) -> None:
    assert loss_curves("m", tmp_path) == []
    log = tmp_path / "trainer_log.jsonl"
    log.write_text('{"step": 1, "loss": 4.5, "loss/zh": 9}\n{"step": 2, "loss": null}\n{"step": 2, "eval_loss": 4.0}\n'
                   '{"step": 3, "loss": 3.5}\n')
    assert loss_curves("m", tmp_path) == [Curve("m", "training", [1, 3], [4.5, 3.5]),
                                          Curve("m", "held out", [2], [4.0])]
    log.write_text('{"step": 0, "eval_loss": 0.7, "margin": 0.0}\n{"step": 1, "loss": 0.6, "margin": 0.1}\n')
    assert loss_curves("m", tmp_path) == [Curve("m", "training", [1], [0.6], PER_PAIR),
                                          Curve("m", "held out", [0], [0.7], PER_PAIR)]
    log.write_text('{"step": 0, "eval_loss": 0.2, "eval_reward": -0.2}\n{"step": 1, "loss": 9.0, "rollout/reward": -0.3}\n'
                   '{"step": 2, "loss": 9.5}\n{"step": 3, "loss": 8.0, "rollout/reward": 0.4}\n')
    assert loss_curves("m", tmp_path) == [Curve("m", "reward", [1, 3], [-0.3, 0.4], PER_ANSWER),
                                          Curve("m", "held out", [0], [-0.2], PER_ANSWER)]
    log.write_text('{"step": 1, "loss": 4.5}\nnot json\n')
    with pytest.raises(DataError, match=r"trainer_log.jsonl:2"):
        loss_curves("m", tmp_path)
