"""Runs: order, reuse, publishing, locks, interruptions, full disks."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import danlu
from danlu import Recipe, run
from danlu.core.artifact import open_artifact
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.run import Stopped, on_main

DRIVER = """\
import sys
sys.path.insert(0, {here!r})
import fake_stages
from danlu.pipeline.stages import STAGES
fake_stages.register(STAGES)
from danlu.cli import main
main()
"""


def load(*overrides):
    return Recipe.load("demo.yaml", overrides=overrides)


def go(recipe, **kwargs):
    out = io.StringIO()
    return run(recipe, console=Console(file=out, width=200), **kwargs), out.getvalue()


def start(folder, *arguments, variables=None, **kwargs):
    """The command line in a process of its own, with the fake stages."""
    script = DRIVER.format(here=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": str(Path(danlu.__file__).parents[1]), **(variables or {})}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=folder, text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def wait_for(path, process, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_order_reuse_and_current(folder, stages):
    made, text = go(load())
    assert stages == ["corpus", "base", "report"]
    assert text.count("runs: has not run yet") == 3
    for name, artifact in made.items():
        pointer = folder / "runs" / "demo" / name / "current"
        assert pointer.read_text().strip() == artifact.folder.name == artifact.fingerprint[:8]
        assert open_artifact(artifact.folder, deep=True).fingerprint == artifact.fingerprint
    assert made["base"].manifest["parents"] == {"corpus": made["corpus"].fingerprint}
    assert made["base"].metrics == {"num_chars": 18, "loss": 0.25, "resumed_at": 0}
    assert "loss 0.25" in text
    again, text = go(load())
    assert stages == ["corpus", "base", "report"]
    assert text.count("reused: nothing has changed") == 3
    assert {name: artifact.folder for name, artifact in again.items()} == \
        {name: artifact.folder for name, artifact in made.items()}


def test_a_changed_setting_makes_a_new_artifact_beside_the_old_one(folder, stages):
    first, _ = go(load())
    stages.clear()
    second, text = go(load("steps.base.max_steps=5"))
    assert stages == ["base", "report"] and "runs: max_steps 3 → 5" in text
    assert first["base"].folder.exists() and second["base"].folder.exists()
    stages.clear()
    back, text = go(load())
    assert stages == [] and "reused: made before with these very settings" in text
    assert (folder / "runs/demo/base/current").read_text().strip() == back["base"].folder.name


def test_the_same_run_elsewhere_gives_the_same_bytes(folder):
    first, _ = go(load(), runs="runs-a")
    second, _ = go(load(), runs="runs-b")
    for name in first:
        ours, theirs = (made[name].folder / "manifest.json" for made in (first, second))
        assert ours.read_bytes() == theirs.read_bytes()


def test_only(folder, stages):
    with pytest.raises(ConfigError) as caught:
        go(load(), only=["base"])
    assert str(caught.value) == ("demo.yaml:7: the step “base” reads “corpus”, which is not there (has not run yet)\n"
                                 "  Run it too: --only corpus --only base")
    assert list(go(load(), only=["corpus", "base"])[0]) == ["corpus", "base"]
    assert stages == ["corpus", "base"]
    go(load(), only=["report"])
    assert stages == ["corpus", "base", "report"]
    with pytest.raises(ConfigError) as caught:
        go(load(), only=["bse"])
    assert str(caught.value) == "demo.yaml: the recipe “demo” has no step “bse”\n  Did you mean base?"


def test_inputs_are_verified_to_the_last_byte(folder):
    made, _ = go(load())
    file = made["corpus"].folder / "words.txt"
    file.write_text(file.read_text().replace("one", "two"))  # the same size
    with pytest.raises(DataError) as caught:
        go(load("steps.base.max_steps=5"))
    assert caught.value.where == str(file) and "bytes do not match" in caught.value.message
    assert not list(folder.glob("runs/demo/base/.work-*"))


def test_a_damaged_artifact_is_never_made_anew_silently(folder, stages):
    made, _ = go(load())
    (made["base"].folder / "step-0").unlink()
    stages.clear()
    with pytest.raises(DataError, match="step-0: is missing"):
        go(load())
    assert stages == []


def test_a_file_that_changes_while_the_run_goes(folder, monkeypatch):
    module = sys.modules["fake_stage_words"]
    real = module.run

    def run_and_edit(context):
        metrics = real(context)
        (folder / "texts" / "a.txt").write_text("edited")
        return metrics

    monkeypatch.setattr(module, "run", run_and_edit)
    with pytest.raises(DataError, match=r"a\.txt: has changed since this run began"):
        go(load())
    assert not (folder / "runs/demo/corpus/current").exists()


@pytest.mark.parametrize("change", ["comes", "goes"])
def test_a_file_that_comes_or_goes_while_the_run_goes(folder, monkeypatch, change):
    module = sys.modules["fake_stage_words"]
    real = module.run

    def run_and_change(context):
        metrics = real(context)
        if change == "comes":
            (folder / "texts" / "new.txt").write_text("five\n")
        else:
            (folder / "texts" / "b.txt").unlink()
        return metrics

    monkeypatch.setattr(module, "run", run_and_change)
    with pytest.raises(DataError, match=r"(new|b)\.txt: has (come or gone|changed) since this run began"):
        go(load())
    assert not (folder / "runs/demo/corpus/current").exists()


def test_a_place_that_cannot_hold_runs(folder):
    (folder / "afile").write_text("")
    with pytest.raises(ConfigError, match=r"afile/demo: cannot be written to"):
        run(load(), runs="afile")


def test_work_folders(folder, monkeypatch):
    module = sys.modules["fake_stage_count"]
    real, failing = module.run, [True]

    def fail_once(context):
        metrics = real(context)
        if failing.pop() if failing else False:
            raise RuntimeError("power cut")
        return metrics

    monkeypatch.setattr(module, "run", fail_once)
    with pytest.raises(RuntimeError, match="power cut"):
        go(load())
    made, text = go(load())
    assert "runs: was interrupted; goes on where it was" in text and made["base"].metrics["resumed_at"] == 3
    failing.append(True)
    monkeypatch.setattr(module, "RESUMES", False)
    with pytest.raises(RuntimeError):
        go(load("steps.base.max_steps=4"))
    made, text = go(load("steps.base.max_steps=4"))
    assert "runs: was interrupted; starts again" in text and made["base"].metrics["resumed_at"] == 0
    assert not list(folder.rglob(".work-*"))


def test_disk_full(folder, monkeypatch):
    def full(context):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["fake_stage_note"], "run", full)
        with pytest.raises(DataError) as caught:
            go(load())
    assert "the disk is full (No space left on device); nothing half-written was published" in str(caught.value)
    assert not (folder / "runs/demo/report/current").exists()
    go(load())


def test_file_size_limit_is_one_message(folder):
    import resource

    process = start(folder, "run", "demo.yaml", "--set", "steps.report.fill=300000",
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the disk is full (File too large); nothing half-written was published" in errors
    assert "Traceback" not in errors
    assert not (folder / "runs/demo/report/current").exists()


def test_two_processes_exactly_one_works(folder):
    slow = ["--set", "steps.base.pause=0.5", "--set", f"steps.base.mark={folder / 'mark'}"]
    first = start(folder, "run", "demo.yaml", *slow)
    wait_for(folder / "mark", first)
    second = start(folder, "run", "demo.yaml", *slow)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"another danlu run is working on runs/demo (process {first.pid})" in errors
    _, errors = first.communicate(timeout=60)
    assert (first.returncode, errors) == (0, "")
    go(load())  # the lock is free again


def test_two_processes_at_the_same_moment(folder):
    processes = [start(folder, "run", "demo.yaml", "--set", "steps.base.pause=0.7") for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert sorted(process.returncode for process in processes) == [0, 2]


@pytest.mark.parametrize("name", ["base", "corpus"])
def test_sigkill_leaves_nothing_half_published(folder, name):
    """Killed inside a stage: no artifact, no `current`; the same command finishes with the bytes of a whole run."""
    whole, _ = go(load(), runs="whole")
    slow = ["--set", "steps.base.pause=0.4", "--set", f"steps.base.mark={folder / 'mark'}"]
    process = start(folder, "run", "demo.yaml", *slow)
    wait_for(folder / "mark" if name == "base" else folder / "runs/demo/.lock", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    for manifest in folder.glob("runs/demo/*/*/manifest.json"):
        open_artifact(manifest.parent, deep=True)
    assert not (folder / "runs/demo/base/current").exists()
    made, _ = go(load())
    for step in ("corpus", "base", "report"):
        ours, theirs = made[step].manifest["files"], whole[step].manifest["files"]
        assert ours == theirs


def test_interrupt(folder):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = start(folder, "run", "demo.yaml", "--set", "steps.base.pause=5", "--set",
                    f"steps.base.mark={folder / 'mark'}")
    signal.signal(signal.SIGINT, before)
    wait_for(folder / "mark", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. Nothing half-written was published" in errors and "Traceback" not in errors
    assert not (folder / "runs/demo/.lock.pid").exists()


def start_ranks(folder, *arguments):
    """Two processes that torchrun might have started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [start(folder, *arguments, variables={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            for rank in range(2)]


def test_two_ranks_make_one_run(folder):
    """One process works and speaks; the other waits and ends well."""
    ranks = start_ranks(folder, "run", "demo.yaml")
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[0][0].count("runs: has not run yet") == 3 and said[1][0] == ""
    assert set(go(load())[0]) == {"corpus", "base", "report"}


class Two:
    """Two processes as one of them sees it; the vote of the other one is given."""

    size = 2

    def __init__(self, rank, other):
        self.rank, self.is_main, self.other, self.votes = rank, rank == 0, other, []

    def agree(self, ok):
        self.votes.append(ok)
        return ok and self.other

    def barrier(self):
        self.agree(True)


def test_an_error_of_the_main_process_stops_all():
    def fail():
        raise ConfigError("wrong")

    main = Two(0, True)
    with pytest.raises(ConfigError, match="wrong"):
        on_main(main, fail)
    assert main.votes == [False]  # the others heard of it
    with pytest.raises(Stopped):
        on_main(Two(1, False), fail)
    assert on_main(Two(1, True), fail) is None
    assert on_main(Two(0, True), lambda: 3) == 3


def test_manifest_tells_how_it_was_made(folder):
    made, _ = go(load())
    config = json.loads((made["corpus"].folder / "manifest.json").read_text())["config"]
    assert config["settings"] == {"dataset": ["texts"], "upper": False} and config["free"] == {"save_steps": 10}
    assert list(config["inputs"][0]["files"]) == ["a.txt", "b.txt"]
    assert made["corpus"].manifest["code"].startswith("0.")
