"""A training that is killed at any moment ends with the bits of one that was not, and every planted bug is noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = 20


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The trials run in a process of their own, which forks and so must never have run a backward pass."""
    path = tmp_path_factory.mktemp("faults") / "report.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "faults.py", "--kills", str(KILLS), "--seed", "5", "--controls",
                           "--report", path], env=environment, capture_output=True, text=True, timeout=300)
    assert path.exists(), done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout
    return found


def test_killed_runs_end_with_the_same_bits(report: dict) -> None:
    assert report["problems"] == []
    assert sum(report["kills"].values()) >= KILLS


def test_kills_strike_in_every_phase(report: dict) -> None:
    families = {phase.split(":")[0] for phase in report["kills"]}
    assert families == {"any time", "step", "log", "evaluation", "checkpoint", "retention", "restore"}


@pytest.mark.parametrize("bug", ["reseeding dropped", "optimizer not restored", "data one step too late",
                                 "data one step too early", "schedule begun again", "hash check skipped"])
def test_planted_bug_changes_the_weights(report: dict, bug: str) -> None:
    assert "model.safetensors" in report["controls"][bug]


def test_planted_bug_in_the_log_is_noticed(report: dict) -> None:
    assert report["controls"]["log not cut back"] == "trainer_log.jsonl"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"])
def test_flipped_byte_is_refused_with_the_name_of_its_file(report: dict, name: str) -> None:
    said = report["controls"][f"byte flipped in {name}"]
    assert "DataError" in said and f"checkpoint-10/{name}" in said and "damaged" in said
