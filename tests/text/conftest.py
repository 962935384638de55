"""A tiny installed package, and the balance of a ledger, for the tests of text/."""

import sys
from pathlib import Path

import pytest

from danlu.core.ledger import Ledger


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tinypackage` on sys.path; importing it fails, so that finding it by import would be noticed."""
    folder = tmp_path / "site" / "tinypackage"
    (folder / "data" / "zh").mkdir(parents=True)
    (folder / "sub").mkdir()
    (folder / "__init__.py").write_text('"""The package.\n\n    Indented."""\nraise RuntimeError("imported")\n')
    (folder / "tool.py").write_text(
        'class A:\n    """About A."""\n    def f(self):\n        """About f."""\n'
        '        def g():\n            "About g."\n'
        'async def h():\n    """About h: 好."""\n')
    (folder / "silent.py").write_text("x = 1\n")
    (folder / "sub" / "__init__.py").write_text('"""Below."""\n')
    (folder / "sub" / "broken.py").write_text("print 'two'\n")
    (folder / "data" / "zh" / "a.txt").write_text("甲\n", encoding="utf-8")
    (folder / "data" / "zh" / "b.jsonl").write_text('{"text": "乙"}\n', encoding="utf-8")
    (folder / "data" / "zh" / "c.yml").write_text("conversations:\n- - 你好\n  - 你好呀\n", encoding="utf-8")
    (tmp_path / "site" / "single_tiny.py").write_text('"""Single."""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "tinypackage" not in sys.modules
    return folder


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()

