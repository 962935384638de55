"""A training that is killed at any moment ends with the bits of one that was not, and every planted bug is noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = {"language": 20, "rm": 4, "dpo": 4, "ppo": 4}
PHASES_OF_ALL = {"any time", "step", "log", "evaluation", "checkpoint", "retention", "restore"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The trials run in a process of their own, which forks and so must never have run a backward pass."""
    path = tmp_path_factory.mktemp("faults") / "report.json"
    kills = [f"{name}={number}" for name, number in KILLS.items()]
    done = subprocess.run([sys.executable, HERE / "faults.py", "--kills", *kills, "--seed", "5", "--controls",
                           "--report", path], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=600)
    assert path.exists(), done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout
    return found


@pytest.mark.parametrize("kind", KILLS)
def test_killed_runs_end_with_the_same_bits(report: dict, kind: str) -> None:
    assert report[kind]["problems"] == []
    assert sum(report[kind]["kills"].values()) >= KILLS[kind]


def test_kills_strike_in_every_phase(report: dict) -> None:
    assert {phase.split(":")[0] for phase in report["language"]["kills"]} == PHASES_OF_ALL


@pytest.mark.parametrize("moment", ["while sampling", "between sampling and scoring", "while scoring",
                                    "between mini-batches"])
def test_kills_strike_within_a_rollout(report: dict, moment: str) -> None:
    assert report["ppo"]["kills"][f"rollout: {moment}"] >= 1


@pytest.mark.parametrize(("kind", "bug"), [
    ("language", "reseeding dropped"), ("language", "optimizer not restored"), ("language", "data one step too late"),
    ("language", "data one step too early"), ("language", "schedule begun again"), ("language", "hash check skipped"),
    ("rm", "reseeding dropped"), ("dpo", "optimizer not restored"), ("ppo", "checkpoint within a rollout"),
    ("ppo", "order of mini-batches not keyed by the rollout"), ("ppo", "seeds of answers not keyed by the rollout"),
    ("ppo", "critic not in the checkpoint")])
def test_planted_bug_changes_the_weights(report: dict, kind: str, bug: str) -> None:
    assert "model.safetensors" in report[kind]["controls"][bug]


def test_planted_bug_in_the_log_is_noticed(report: dict) -> None:
    assert report["language"]["controls"]["log not cut back"] == "trainer_log.jsonl"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"])
def test_flipped_byte_is_refused_with_the_name_of_its_file(report: dict, name: str) -> None:
    said = report["language"]["controls"][f"byte flipped in {name}"]
    assert "DataError" in said and f"checkpoint-10/{name}" in said and "damaged" in said
