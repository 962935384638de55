"""Datasets in the hub's layout: local folders, and repositories in the hub client's own cache, without a network."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danlu.core.errors import ConfigError
from danlu.core.ledger import Ledger
from danlu.text.formats import read_dialogues
from danlu.text.hub import is_hub_id, parts_of, snapshot
from danlu.text.registry import find

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CONFIGS = """\
---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/part-*.jsonl
  - split: test
    path: [en/held.jsonl, en/more.jsonl]
- config_name: zh
  default: true
  data_files: zh/*.jsonl
- config_name: dir
  data_dir: deep
---
# A data set
"""


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": "q", "response": name}
        if path.suffix == ".parquet":
            pq.write_table(pa.table({key: [value] for key, value in row.items()}), path)
        else:
            path.write_text(json.dumps(row))
    return folder


def parts(folder: Path, subset: str | None = None, split: str | None = None, below: str = "") -> list[str]:
    return [item.label.removeprefix("d/") for item in parts_of(folder, "d", subset, split, SUFFIXES, below)]


def test_splits_are_told_by_names(tmp_path: Path) -> None:
    write(tmp_path, "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
          "data/train_sft-00000-of-00001.parquet", ".cache/train.jsonl", "notes.txt")
    assert parts(tmp_path) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert parts(tmp_path, split="test") == ["data/test-00000-of-00001.parquet"]
    assert parts(tmp_path, split="train_sft") == ["data/train_sft-00000-of-00001.parquet"]
    with pytest.raises(ConfigError, match="no split “dev”") as caught:
        parts(tmp_path, split="dev")
    assert caught.value.hint == "Its splits: test, train, train_sft."


@pytest.mark.parametrize("names, split, expected", [
    (["train.csv", "valid.csv"], "validation", ["valid.csv"]), (["my_dev_set.jsonl", "train.jsonl"], "validation",
                                                               ["my_dev_set.jsonl"]),
    (["training/a.json", "testing/b.json"], None, ["training/a.json"]), (["a.json", "b.json"], None, ["a.json", "b.json"]),
    (["train_data/test.json", "train_data/part.json"], None, ["train_data/part.json"]),
    (["latest.json", "b.json"], None, ["b.json", "latest.json"]), (["test.json"], None, ["test.json"])])
def test_words_in_names(tmp_path: Path, names: list[str], split: str | None, expected: list[str]) -> None:
    assert parts(write(tmp_path, *names), split=split) == expected


def test_a_subset_is_a_folder_where_no_readme_says_more(tmp_path: Path) -> None:
    write(tmp_path, "en/train.jsonl", "en/test.jsonl", "zh/train.jsonl")
    assert parts(tmp_path, "en") == ["en/train.jsonl"] and parts(tmp_path, "en", "test") == ["en/test.jsonl"]
    assert parts(tmp_path, "default") == ["en/train.jsonl", "zh/train.jsonl"] == parts(tmp_path)
    assert parts(tmp_path, below="zh") == ["zh/train.jsonl"]
    with pytest.raises(ConfigError, match="no subset “fr”"):
        parts(tmp_path, "fr")


def test_the_readme_names_subsets_and_splits(tmp_path: Path) -> None:
    write(tmp_path, "en/part-1.jsonl", "en/part-2.jsonl", "en/held.jsonl", "en/more.jsonl", "zh/a.jsonl",
        "zh/deeper/b.jsonl",
          "deep/x.jsonl")
    (tmp_path / "README.md").write_text(CONFIGS)
    assert parts(tmp_path, "en") == ["en/part-1.jsonl", "en/part-2.jsonl"]
    assert parts(tmp_path, "en", "test") == ["en/held.jsonl", "en/more.jsonl"]
    assert parts(tmp_path) == ["zh/a.jsonl"] == parts(tmp_path, "zh", "train")
    assert parts(tmp_path, "dir") == ["deep/x.jsonl"]
    with pytest.raises(ConfigError, match="no subset “fr”") as caught:
        parts(tmp_path, "fr")
    assert caught.value.hint == "Its subsets: en, zh, dir."
    (tmp_path / "README.md").write_text(CONFIGS.replace("  default: true\n", ""))
    with pytest.raises(ConfigError, match="has several subsets"):
        parts(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ConfigError, match=r"README.md: its front matter is no YAML"):
        parts(tmp_path)
    (tmp_path / "README.md").write_text("A readme\n---\nnot: this\n---\n")
    assert len(parts(tmp_path)) == 7


def test_patterns_cannot_leave_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "secret.jsonl", "set/a.jsonl")
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: ../secret.jsonl\n---\n")
    with pytest.raises(ConfigError, match="no split"):
        parts(tmp_path / "set")


def test_what_may_be_the_id_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for name, expected in (("owner/name", True), ("owner/name-1.5", True), ("name", False), ("a/b/c", False),
        ("a/b.jsonl", False),
                           ("a/b.jsonl.gz", False), ("here/name", False), ("./a", False)):
        assert is_hub_id(name, [tmp_path]) is expected, name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's client that holds one dataset; the network is off."""
    from huggingface_hub import constants

    root = tmp_path / "cache"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = root / "datasets--owner--talks"
    snapshot = repository / "snapshots" / commit
    write(snapshot, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "zh/train.jsonl")
    (snapshot / "loader.py").write_text("raise RuntimeError")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(root))
    return tmp_path


def answers(name: str, base: Path) -> list[str]:
    ledger = Ledger()
    found = [dialogue.messages[-1].content for dialogue in read_dialogues(name, base, ledger)]
    ledger.check()
    return found


def test_a_dataset_of_the_hub_is_read_from_the_cache(cache: Path) -> None:
    assert answers("owner/talks[zh]", cache) == ["zh/train.jsonl"]
    assert answers("owner/talks[data:test]#1", cache) == ["data/test-00000-of-00001.parquet"]
    assert find("owner/talks[zh]", cache).files[0].label == "owner/talks/zh/train.jsonl"


def test_an_entry_that_names_the_hub(cache: Path) -> None:
    entries = {"talks": {"hf_hub_url": "owner/talks", "ms_hub_url": "x/y", "split": "test"},
               "below": {"hf_hub_url": "owner/talks", "folder": "zh"}, "unknown": {"hf_hub_url": "owner/unknown"}}
    (cache / "dataset_info.json").write_text(json.dumps(entries))
    assert answers("talks", cache) == ["data/test-00000-of-00001.parquet"]
    assert answers("below", cache) == ["zh/train.jsonl"]
    with pytest.raises(ConfigError, match="“owner/unknown” is neither here nor on the hub"):
        answers("unknown", cache)


@pytest.mark.parametrize(("subset", "split", "below", "expected"), [
    ("en", "train", "", ["en/part-1.jsonl", "en/part-2.jsonl"]), ("en", "test", "", ["en/held.jsonl", "en/more.jsonl"]),
    (None, "train", "", ["zh/a.jsonl", "zh/deeper/b.jsonl"]), ("dir", "train", "", ["deep/x.jsonl"]),
    ("zh", "train", "zh/deeper", ["zh/deeper/b.jsonl"])])
@pytest.mark.parametrize("readme", [True, False])
def test_only_what_is_asked_for_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readme: bool,
                                           subset: str | None, split: str, below: str, expected: list[str]) -> None:
    from huggingface_hub.utils import filter_repo_objects

    there, here = tmp_path / "there", tmp_path / "here"
    write(there, "en/part-1.jsonl", "en/part-2.jsonl", "en/held.jsonl", "en/more.jsonl", "zh/a.jsonl", "zh/deeper/b.jsonl",
          "deep/x.jsonl", "zh/model.bin", "other/train.jsonl")
    if readme:
        (there / "README.md").write_text(CONFIGS)

    def download(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("owner/mix", "dataset")
        for path in filter_repo_objects([str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()],
                                        allow_patterns=allow_patterns):
            (here / path).parent.mkdir(parents=True, exist_ok=True)
            (here / path).write_bytes((there / path).read_bytes())
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert snapshot("owner/mix", subset, split, below) == here
    found = sorted(str(path.relative_to(here)) for path in here.rglob("*.*") if path.name != "README.md")
    folder = {"dir": "dir/", None: ""}.get(subset, f"{subset}/")  # without a README a subset is a folder, of all splits
    every = sorted(str(path.relative_to(there)) for path in there.rglob("*.jsonl"))
    assert found == (expected if readme else [path for path in every if path.startswith(below or folder)])
    if readme:
        with pytest.raises(ConfigError, match="no subset “fr”"):
            snapshot("owner/mix", "fr", split)


def test_an_unknown_dataset(cache: Path) -> None:
    with pytest.raises(ConfigError, match="“owner/gone” is neither here nor on the hub") as caught:
        answers("owner/gone", cache)
    assert "dataset_info.json" in str(caught.value.hint)
