"""Small recipes with one setting changed, and run by two processes."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

import danlu
from danlu.pipeline.recipe import Recipe


def changed(text: str, **settings: object) -> Recipe:
    """The recipe with `step__key=value` set; a value of None takes the key away."""
    values = yaml.safe_load(text)
    for name, value in settings.items():
        step, _, key = name.partition("__")
        if value is None:
            del values["steps"][step][key]
        else:
            values["steps"][step][key] = value
    return Recipe.from_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), base=Path.cwd())


def run_on_two_ranks(text: str, runs: str) -> None:
    """A recipe under torchrun (gloo, FSDP2), into a folder of runs of its own."""
    Path("small.yaml").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(danlu.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "danlu.cli", "run", "small.yaml", "--runs", runs], env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
