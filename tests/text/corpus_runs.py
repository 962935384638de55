"""The corpus stage run on small files, and what it leaves."""

import hashlib
import io
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from danlu.pipeline.context import Context, Input, SingleProcess
from danlu.pipeline.stages import corpus
from danlu.pipeline.stages.corpus import Settings
from danlu.text.files import resolve
from danlu.text.splits import plan_splits


def run(base: Path, work: str, size: int, **keys) -> dict:
    """The stage with splits of that size; workers: 1 unless it is said."""
    sources = [{"path": "a.jsonl", "category": "rows"}, {"path": "b", "category": "files", "group": "file"}]
    settings = Settings(**{"sources": sources, "near_dedup": {}, "dedup_paragraphs": True, "heldout_share": 0.3,
                           "heldout": ["a.jsonl:4", "*/0[02].txt"], "workers": 1, **keys})
    inputs = {reference.text: Input(reference.text, "files", "f", files=resolve(reference.text, base))
              for reference in corpus.references(settings)}
    (base / work).mkdir(exist_ok=True)
    original, corpus.plan_splits = corpus.plan_splits, partial(plan_splits, size=size)
    try:
        return corpus.run(Context("corpus", settings, 0, inputs, base / work, "f", base, SingleProcess(),
                                  Console(file=io.StringIO(), width=200)))
    finally:
        corpus.plan_splits = original


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run_killed(base: Path, owner: Any, name: str, nth: int, size: int, **keys) -> None:
    """Runs the stage into `killed` in a process that is killed when it calls `owner.name` for the nth time; then empties
    the work folder, as the pipeline does, but not what is kept beside it."""
    child = os.fork()
    if not child:
        calls, original = 0, vars(owner)[name]

        def dies(*args, **others):
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **others)

        setattr(owner, name, dies)
        run(base, "killed", size, **keys)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    for path in (base / "killed").iterdir():
        path.unlink()
