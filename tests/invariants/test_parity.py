"""Thirty steps of danlu and of TRL on the same batches, with a tiny model: the same curves but for rounding."""

import json
from pathlib import Path

import numpy as np
import parity
import pytest
from tiny_chat import make_folder

WORDS = ["fox", "dog", "river", "lazy", "brown", "over", "花", "quick", "鸟", "风"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "disabled",
                        "TRACKIO_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)


def rows(count: int) -> list[dict[str, str]]:
    """Prompts and answers of very different lengths."""
    rng = np.random.default_rng(0)

    def words(longest: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))

    return [{"prompt": words(8), "response": words(12), "chosen": words(9) + " fox", "rejected": words(9)}
            for _ in range(count)]


@pytest.mark.parametrize("stage", parity.STAGES)
def test_the_curve_of_thirty_steps_is_that_of_trl(tmp_path: Path, stage: str) -> None:
    model = make_folder(tmp_path / "model")
    keys = ("prompt", "response") if stage in ("sft", "packed") else ("prompt", "chosen", "rejected")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({key: row[key] for key in keys}, ensure_ascii=False) + "\n" for row in rows(130)))
    curves = parity.compare(stage, model, str(data), tmp_path / "runs", cutoff_len=96)
    assert len(curves.own) == len(curves.trl) == parity.STEPS
    assert curves.worst < 1e-4 and curves.well
    assert curves.own[0] != curves.own[-1]


def test_a_curve_with_a_trend_is_seen() -> None:
    own = np.linspace(2, 1, 30)
    assert parity.Curves(own, own * (1 + 1e-7)).well
    assert not parity.Curves(own, own * (1 + 5e-4)).well, "a wrong divisor"
    assert not parity.Curves(own, np.roll(own, 1)).well, "a shifted schedule"
