"""Freed memory stays in the process that reads with a model."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import resource, torch
from danlu.models.heap import keep_freed_memory
keep_freed_memory()
def make():
    one, other = torch.ones(12 << 20), torch.ones(10 << 20)  # 48 and 40 MB
    return one[:10 << 20] + other
for _ in range(12):
    make()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    make()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def faults(**environment: str) -> int:
    """Pages that the system handed out while tensors were made that had been made before."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    told = subprocess.run([sys.executable, "-c", COUNT], env=clean | environment, check=True, capture_output=True)
    return int(told.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps or gives back as it likes")
def test_tensors_are_made_of_memory_that_was_freed() -> None:
    assert faults() < 200
    if "[always]" not in (PAGES.read_text() if PAGES.is_file() else ""):  # else a fault hands out 512 pages
        assert faults(MALLOC_MMAP_MAX_="65536") > 4 * 30_000, "the environment says otherwise, and the count would notice"


def test_whatever_reads_with_a_model_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from danlu.models import root

    called: list[bool] = []
    monkeypatch.setattr(root, "keep_freed_memory", lambda: called.append(True))
    root.Trunk(nn.Linear(1, 1))  # type: ignore[arg-type]  # no model is needed
    assert called == [True]
