"""A whole run that is killed while reading, training a tokenizer, publishing, … ends with the undisturbed artifacts."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KILLS = 12


def test_killed_roads_end_with_the_same_artifacts(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = subprocess.run([sys.executable, HERE / "road.py", "--kills", str(KILLS), "--seed", "2", "--report", path],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["problems"] == [] and sum(report["kills"].values()) >= KILLS
    assert {phase.split(":")[0] for phase in report["kills"]} >= {"corpus", "tokenizer", "examples", "training", "model"}
