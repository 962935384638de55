"""Checkpoints are whole, verified, complete, and never the last one to go."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small import freeze_some, make_trainer, ragged_examples, tiny_root, weights
from torch import nn

from danlu.core.artifact import open_artifact
from danlu.core.errors import DataError
from danlu.data.batch import Batch
from danlu.objectives.language import Language
from danlu.train import checkpoint
from danlu.train.checkpoint import TrainState
from danlu.train.optimizer import OptimizerConfig, build_optimizer
from danlu.train.parallel import World
from danlu.train.step import train_step

WORLD = World()
PRINT = "a" * 64


def moved_root(root=None, steps: int = 2):
    """(root, optimizer) after a few steps, so that the optimizer has something to remember."""
    root = root or tiny_root()
    optimizer = build_optimizer(root, OptimizerConfig(learning_rate=1e-2))
    for step in range(steps):
        train_step(root, Language(), [Batch.pack(ragged_examples(3, seed=step))], optimizer, world=WORLD, seed=0,
                   step=step, max_grad_norm=1.0)
    return root, optimizer


def save(folder, step: int, root, optimizer, **fields) -> None:
    checkpoint.save_checkpoint(folder, root, optimizer, TrainState(step=step, **fields), fingerprint=PRINT, world=WORLD)


def test_everything_comes_back_to_the_bit(tmp_path) -> None:
    root, optimizer = moved_root()
    state = TrainState(step=2, chain="ab", num_input_tokens_seen=99, num_skipped=1, best_metric=0.1 + 0.2, best_step=1,
                       evals_without_gain=1)
    checkpoint.save_checkpoint(tmp_path, root, optimizer, state, fingerprint=PRINT, world=WORLD)
    other = tiny_root(seed=5)
    fresh = build_optimizer(other, OptimizerConfig(learning_rate=1e-2))
    assert checkpoint.load_checkpoint(tmp_path, other, fresh, fingerprint=PRINT) == state
    left, right = checkpoint.stored_tensors(root), checkpoint.stored_tensors(other)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    left, right = checkpoint.optimizer_tensors(root, optimizer), checkpoint.optimizer_tensors(other, fresh)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    for model, each in ((root, optimizer), (other, fresh)):
        train_step(model, Language(), [Batch.pack(ragged_examples(3))], each, world=WORLD, seed=0, step=2,
                   max_grad_norm=1.0)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(root).items())


def test_files_are_plain_safetensors(tmp_path) -> None:
    tensors = {"half": torch.randn(3, 5).to(torch.bfloat16), "empty": torch.zeros(0, 4), "one": torch.tensor(2.5),
               "whole": torch.arange(6).reshape(2, 3).t(), "yes": torch.tensor([True, False])}
    checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    targets = {name: torch.zeros_like(value) for name, value in tensors.items()}
    checkpoint.read_tensors(tmp_path / "x.safetensors", targets)
    assert all(torch.equal(targets[name], tensors[name]) for name in targets)


def test_tied_weights_are_stored_once_and_frozen_ones_not_at_all(tmp_path) -> None:
    root, optimizer = moved_root()
    save(tmp_path, 2, root, optimizer)
    names = set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert names == {name for name, _ in root.named_parameters()} and "lm.lm_head.weight" not in names
    root, optimizer = moved_root(freeze_some(tiny_root()))
    save(tmp_path / "frozen", 2, root, optimizer)
    names = set(load_file(tmp_path / "frozen" / "checkpoint-2" / "model.safetensors"))
    assert names and all("layers.1" in name for name in names)


def test_stored_buffers_are_kept_and_derived_ones_not() -> None:
    class WithBuffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("derived", torch.ones(1), persistent=False)
    assert set(checkpoint.stored_tensors(WithBuffers())) == {"weight", "kept"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_any_damage_is_refused_by_the_name_of_the_file(tmp_path, name: str, damage: str) -> None:
    root, optimizer = moved_root()
    save(tmp_path, 1, root, optimizer)
    save(tmp_path, 2, root, optimizer)
    path = tmp_path / "checkpoint-2" / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-2])  # a manifest may lose its last line break
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        checkpoint.load_checkpoint(tmp_path, root, optimizer, fingerprint=PRINT)
    assert name in str(caught.value) and "checkpoint-2" in str(caught.value)


def test_other_settings_are_refused(tmp_path) -> None:
    root, optimizer = moved_root()
    save(tmp_path, 2, root, optimizer)
    with pytest.raises(DataError, match="other settings"):
        checkpoint.load_checkpoint(tmp_path, root, optimizer, fingerprint="b" * 64)


def test_another_model_is_refused(tmp_path) -> None:
    root, optimizer = moved_root()
    save(tmp_path, 2, root, optimizer)
    other = tiny_root(tied=False)
    with pytest.raises(DataError, match=r"lacks tensor lm\.lm_head\.weight"):
        checkpoint.load_checkpoint(tmp_path, other, build_optimizer(other, OptimizerConfig()), fingerprint=PRINT)
    checkpoint.write_tensors(tmp_path / "x", {"w": torch.zeros(2, 3)})
    with pytest.raises(DataError, match=r"\[2, 3\]"):
        checkpoint.read_tensors(tmp_path / "x", {"w": torch.zeros(3, 2)})
    with pytest.raises(DataError, match="unknown tensor w"):
        checkpoint.read_tensors(tmp_path / "x", {})


def test_an_empty_folder_is_a_training_that_has_not_begun(tmp_path) -> None:
    root, optimizer = moved_root()
    assert checkpoint.load_checkpoint(tmp_path / "none", root, optimizer, fingerprint=PRINT) == TrainState()


def test_the_newest_is_the_one_with_the_highest_step(tmp_path) -> None:
    root, optimizer = moved_root()
    for step in (100, 20, 3):
        save(tmp_path, step, root, optimizer)
    (tmp_path / "checkpoint-x").mkdir()
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [3, 20, 100]
    assert checkpoint.load_checkpoint(tmp_path, root, optimizer, fingerprint=PRINT).step == 100


def test_retention_keeps_the_newest_and_what_they_speak_of(tmp_path) -> None:
    root, optimizer = moved_root()
    for step, best in ((5, None), (10, 6), (15, 12), (20, 12)):
        if best is not None and not (tmp_path / f"best-{best}").exists():
            checkpoint.save_best(tmp_path, root, TrainState(step=best), fingerprint=PRINT, world=WORLD)
        save(tmp_path, step, root, optimizer, best_step=best)
        checkpoint.retain(tmp_path, 2, best)
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {5: {"checkpoint-5"}, 10: {"checkpoint-5", "checkpoint-10", "best-6"},
                        15: {"checkpoint-10", "checkpoint-15", "best-6", "best-12"},
                        20: {"checkpoint-15", "checkpoint-20", "best-12"}}[step]


def test_no_checkpoint_goes_while_a_newer_one_is_damaged(tmp_path) -> None:
    root, optimizer = moved_root()
    for step in (1, 2, 3):
        save(tmp_path, step, root, optimizer)
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="missing"):
        checkpoint.retain(tmp_path, 1, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 3


def test_waste_of_interruptions_is_removed(tmp_path) -> None:
    root, optimizer = moved_root()
    save(tmp_path, 2, root, optimizer)
    for name in (".saving-checkpoint-4", ".removing-checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    checkpoint.remove_waste(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    checkpoint.remove_waste(tmp_path / "none")


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch) -> None:
    root, optimizer = moved_root()
    usage = shutil.disk_usage(tmp_path)._replace(free=checkpoint.SLACK + 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="MiB free and a checkpoint takes"):
        save(tmp_path, 2, root, optimizer)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half(tmp_path) -> None:
    """The limit on the size of files makes the system refuse a write in the middle of the optimizer's file."""
    root, optimizer = moved_root()
    save(tmp_path, 1, root, optimizer)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir()}
    limit = (sizes["model.safetensors"] + sizes["optimizer.safetensors"]) // 2
    assert sizes["model.safetensors"] < limit < sizes["optimizer.safetensors"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DataError, match="disk is full"):
            save(tmp_path, 2, root, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    open_artifact(tmp_path / "checkpoint-1", deep=True)
    save(tmp_path, 2, root, optimizer)
    open_artifact(tmp_path / "checkpoint-2", deep=True)


def test_the_same_state_gives_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, 2, *moved_root())
    left, right = tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2"
    for path in left.iterdir():
        assert path.read_bytes() == (right / path.name).read_bytes()


def test_only_a_lower_finite_loss_is_better() -> None:
    assert checkpoint.better(2.0, None) and checkpoint.better(1.9, 2.0)
    assert not checkpoint.better(2.0, 2.0) and not checkpoint.better(float("nan"), None)
    assert not checkpoint.better(float("inf"), None)


def test_a_checkpoint_says_what_it_is(tmp_path) -> None:
    trainer = make_trainer(tmp_path / "out")
    list(trainer.fit())
    trainer.save()
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["step"] == 8 and len(state["chain"]) == 64 and state["num_input_tokens_seen"] > 0
    assert open_artifact(tmp_path / "out" / "checkpoint-8", kind="checkpoint", deep=True).metrics == {"step": 8}
