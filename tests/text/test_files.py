"""Finding sources: files, folders, globs, packages and modules, without importing anything."""

import os
import sys
from pathlib import Path

import pytest

from danlu.core.errors import ConfigError
from danlu.text.files import docstring_names, locate, modules, passed_over, resolve


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "deep/c.jsonl", "deep/er/d.txt", ".hidden/e.txt", ".f.txt", "picture.png", "x.yml"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    return tmp_path


def test_a_folder_gives_its_known_files_sorted_and_without_hidden_ones(tree: Path) -> None:
    found = locate("tree/", tree, (".txt", ".md", ".jsonl"))
    assert [item.label for item in found] == ["tree/a.md", "tree/b.txt", "tree/deep/c.jsonl", "tree/deep/er/d.txt"]
    assert all(item.path.is_file() for item in found)
    assert tree / "tree" / "x.yml" in resolve("tree", tree)


def test_what_of_a_folder_is_not_read_is_counted(tree: Path) -> None:
    (tree / "elsewhere").mkdir()
    (tree / "tree" / "deep" / "link").symlink_to(tree / "elsewhere")
    (tree / "tree" / "more.txt").symlink_to(tree / "tree" / "b.txt")
    known = (".txt", ".md", ".jsonl")
    expected = {"files of other kinds": 2, "hidden files": 2, "links to folders": 1}
    assert passed_over("tree", tree, known) == passed_over(str(tree / "tree"), Path("/"), known) == expected
    for path in ("tree/b.txt", "tree/*.txt", "package:tree", "docstrings:json", "nothing"):
        assert passed_over(path, tree, known) == {}, path


def test_files_globs_and_absolute_paths(tree: Path) -> None:
    assert resolve("tree/picture.png", tree) == [tree / "tree" / "picture.png"]  # named, so taken whatever it is
    assert [item.label for item in locate("tree/**/*.txt", tree)] == ["tree/b.txt", "tree/deep/er/d.txt"]
    absolute = str(tree / "tree" / "*.txt")
    assert [item.label for item in locate(absolute, Path("/nowhere"))] == [str(tree / "tree" / "b.txt")]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert resolve("a[1].txt", tmp_path) == [tmp_path / "a[1].txt"]


def test_the_current_folder_comes_before_the_recipes(tree: Path, tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "here"
    (here / "tree").mkdir(parents=True)
    (here / "tree" / "mine.txt").write_text("x")
    monkeypatch.chdir(here)
    assert [path.name for path in resolve("tree", tree)] == ["mine.txt"]


@pytest.mark.parametrize("path", ["nothing.txt", "tree/*.csv", "empty", ""])
def test_nothing_found_is_an_error(tree: Path, path: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(ConfigError):
        resolve(path, tree)


def test_files_inside_a_package(package: Path) -> None:
    base = Path()
    assert [item.label for item in locate("package:tinypackage/data/zh", base)] == [
        "package:tinypackage/data/zh/a.txt", "package:tinypackage/data/zh/b.jsonl", "package:tinypackage/data/zh/c.yml"]
    assert resolve("package:tinypackage/data/zh/a.txt", base) == [package / "data" / "zh" / "a.txt"]
    assert resolve("package:tinypackage/data/*/*.txt", base) == [package / "data" / "zh" / "a.txt"]
    assert "tinypackage" not in sys.modules


@pytest.mark.parametrize("path", ["package:tinypackage/../single_tiny.py", "package:tinypackage/data/../../x",
                                  "package:tinypackage//etc/passwd", "package:../x", "package:"])
def test_a_path_cannot_leave_its_package(package: Path, path: str) -> None:
    with pytest.raises(ConfigError):
        resolve(path, Path())


def test_a_link_cannot_leave_its_package(package: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    os.symlink(tmp_path / "secret.txt", package / "data" / "link.txt")
    with pytest.raises(ConfigError, match="link"):
        resolve("package:tinypackage/data/link.txt", Path())


def test_a_package_that_is_not_there_gets_a_pip_hint(package: Path) -> None:
    with pytest.raises(ConfigError, match="pip install no_such_package_at_all"):
        resolve("package:no_such_package_at_all/x.txt", Path())
    with pytest.raises(ConfigError, match="pip install no_such_package_at_all"):
        modules("no_such_package_at_all")
    with pytest.raises(ConfigError, match="no such file"):
        resolve("package:tinypackage/nothing.txt", Path())
    with pytest.raises(ConfigError, match="single module"):
        resolve("package:single_tiny/x.txt", Path())


def test_modules_are_found_by_name_without_importing(package: Path) -> None:
    assert [name for name, _ in modules("tinypackage")] == [
        "tinypackage", "tinypackage.silent", "tinypackage.sub", "tinypackage.sub.broken", "tinypackage.tool"]
    assert [name for name, _ in modules("tinypackage.sub")] == ["tinypackage.sub", "tinypackage.sub.broken"]
    assert modules("tinypackage.tool") == [("tinypackage.tool", package / "tool.py")]
    assert modules("single_tiny") == [("single_tiny", package.parent / "single_tiny.py")]
    assert "tinypackage" not in sys.modules


def test_modules_of_the_standard_library() -> None:
    assert ("json.decoder" in dict(modules("json"))) and ("os" in dict(modules("os")))  # os is frozen
    with pytest.raises(ConfigError, match="no Python source"):
        modules("sys")


def test_docstring_names() -> None:
    assert docstring_names("docstrings:json, email.mime,json") == ["json", "email.mime"]
    for wrong in ("docstrings:", "docstrings:a,", "docstrings:a-b", "docstrings:../x"):
        with pytest.raises(ConfigError):
            docstring_names(wrong)


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    for folder in ("a/b", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text("x")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "self").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "elsewhere")
    assert [file.label for file in locate("a", tmp_path)] == ["a/b/x.txt"]
    assert [file.label for file in locate("a/**/*.txt", tmp_path)] == ["a/b/x.txt", "a/other/x.txt"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are always UTF-8")
def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/a\xff.txt", "wb") as file:
        file.write(b"text")
    for path in (str(tmp_path), str(tmp_path / "*.txt")):
        with pytest.raises(ConfigError, match=r"xff.txt' is not UTF-8\n +Rename it"):
            locate(path, tmp_path)
