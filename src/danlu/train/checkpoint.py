"""Checkpoints: all that the next step depends on, written whole or not at all, verified to the last byte when read.

    checkpoint-15/
      model.safetensors      trainable weights (a tied weight once) and stored buffers, by name
      optimizer.safetensors  every parameter's state: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`
      trainer_state.json     the TrainState
      manifest.json          the hash of every file

The folder is written under a temporary name and published by a rename (`core/artifact.py`). Weights are gathered one at
a time, so a checkpoint does not depend on the number of processes. Generators are keyed by place, so there is none to
store. The newest checkpoint is the one with the highest step; if it is damaged the training stops and names the file.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from danlu import __version__
from danlu.core.artifact import disk_errors, fresh_folder, open_artifact, publish
from danlu.core.errors import DataError
from danlu.train.parallel import World

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"
SAVING, REMOVING = ".saving-", ".removing-"  # folders under these names are waste that an interruption left
SLACK = 16 << 20  # bytes that have to be free besides the checkpoint itself

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL"}


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a training stands. Everything random is keyed by these numbers, so they are enough to go on.

    step                optimizer steps done, skipped ones included; the position in the data
    chain               sha256 over the example indices of every step so far: H = sha256(H_before ‖ indices)
    num_skipped_in_row  steps with a loss or gradient that was not finite, since the last good one
    best_metric         the lowest eval_loss so far, found after `best_step`
    micro_batch_tokens  [as set, as lowered] once memory has run out, so that a resumed training cuts alike
    """

    step: int = 0
    chain: str = ""
    num_input_tokens_seen: int = 0
    num_skipped: int = 0
    num_skipped_in_row: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    micro_batch_tokens: list[int] | None = None


def stored_tensors(root: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: trainable parameters (tied ones once) and the buffers of the state dict."""
    buffers = dict(root.named_buffers())
    stored = {name for name in root.state_dict() if name in buffers}
    return {**{name: value for name, value in root.named_parameters() if value.requires_grad},
            **{name: value for name, value in buffers.items() if name in stored}}


def optimizer_tensors(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's states by the name of their parameter; a parameter that never had a gradient has none."""
    return {f"{name}.{key}": value for name, parameter in root.named_parameters() if parameter in optimizer.state
            for key, value in sorted(optimizer.state[parameter].items())}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of whole tensors, not of this rank's shards."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, gathering split tensors one at a time. Every rank calls it, one has a path."""
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path or os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if path is not None:
                file.write(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fills the targets in place; names and shapes have to be the file's. Split tensors take their part of it."""
    with safe_open(path, "pt") as file:
        _same_names(path, set(file.keys()), set(targets))
        for name, target in targets.items():
            _place(path, name, file.get_tensor(name), target)


def _same_names(path: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        name = min(found ^ wanted)
        raise DataError(f"{'lacks' if name in wanted else 'has an unknown'} tensor {name}", where=str(path),
                        hint="The model is not the one that was being trained; finish that run with the same model.")


def _place(path: Path, name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape or value.dtype != target.dtype:
        raise DataError(f"tensor {name} is {value.dtype} {list(value.shape)}; the model's is "
                        f"{target.dtype} {list(target.shape)}", where=str(path))
    with torch.no_grad():
        value = value.to(target.device)
        if isinstance(target, DTensor):  # every rank reads the file itself, so nothing is sent
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)


def read_optimizer(path: Path, root: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the states of a file into an optimizer, for the parameters of the same names."""
    parameters = {name: parameter for name, parameter in root.named_parameters() if parameter.requires_grad}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a dict
            name, _, slot = key.rpartition(".")
            if name not in parameters:
                raise DataError(f"has a state for the unknown parameter {name}", where=str(path))
            parameter, value = parameters[name], file.get_tensor(key)
            if value.shape == parameter.shape:
                target = torch.empty_like(parameter, dtype=value.dtype)
                _place(path, key, value, target)
            else:  # a counter
                target = value.to(parameter.device)
            optimizer.state[parameter][slot] = target


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises DataError unless that much is free on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SLACK:
        raise DataError(f"the disk has {free / 2**20:.0f} MiB free and a checkpoint takes {num_bytes / 2**20:.0f} MiB",
                        where=str(folder), hint="Free some space and run the same command again; it goes on from the "
                        "last checkpoint. save_total_limit says how many are kept.")


def save_checkpoint(folder: Path, root: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *,
                    fingerprint: str, world: World) -> None:
    """Writes and publishes `checkpoint-<step>`. Every rank calls it; the main one writes.

    Raises DataError where the disk is too full, before or while writing; nothing half-written gets a real name.
    """
    files = {MODEL: stored_tensors(root), OPTIMIZER: optimizer_tensors(root, optimizer)}
    _publish(folder, f"checkpoint-{state.step}", files, state, "checkpoint", fingerprint, world)


def save_best(folder: Path, root: nn.Module, state: TrainState, *, fingerprint: str, world: World) -> None:
    """Writes and publishes `best-<step>`: the weights alone. One of that name, from before an interruption, goes."""
    name = f"best-{state.step}"
    if world.is_main and (folder / name).exists():
        remove_folder(folder / name)
    _publish(folder, name, {MODEL: stored_tensors(root)}, state, "best", fingerprint, world)


def _publish(folder: Path, name: str, files: Mapping[str, Mapping[str, Tensor]], state: TrainState, kind: str,
             fingerprint: str, world: World) -> None:
    if not world.is_main:
        for tensors in files.values():
            write_tensors(None, tensors)
        world.barrier()
        return
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(num_bytes(tensors) for tensors in files.values()))
    work = folder / f"{SAVING}{name}"
    try:
        with disk_errors(folder):
            fresh_folder(work)
            for file, tensors in files.items():
                write_tensors(work / file, tensors)
            (work / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
            publish(work, folder / name, kind=kind, fingerprint=fingerprint, parents={}, config={},
                    metrics={"step": state.step}, code=__version__)
    except DataError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    world.barrier()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, oldest first."""
    return _numbered(folder, "checkpoint")


def _numbered(folder: Path, word: str) -> list[tuple[int, Path]]:
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            match = re.fullmatch(rf"{word}-(\d+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found)


def load_checkpoint(folder: Path, root: nn.Module, optimizer: torch.optim.Optimizer, *,
                    fingerprint: str) -> TrainState:
    """Restores the newest checkpoint of a folder; without any, the state of a training that has not begun.

    Raises DataError naming the damaged file, or where the checkpoint belongs to a training with other settings.
    """
    found = checkpoints(folder)
    if not found:
        return TrainState()
    step, newest = found[-1]
    artifact = open_artifact(newest, kind="checkpoint", deep=True)
    if artifact.fingerprint != fingerprint:
        raise DataError("belongs to a training with other settings or data", where=str(newest),
                        hint="Give the run another folder, or remove this one to start anew.")
    state = TrainState(**json.loads((newest / STATE).read_text(encoding="utf-8")))
    assert state.step == step, "a checkpoint is named by its step"
    read_tensors(newest / MODEL, stored_tensors(root))
    read_optimizer(newest / OPTIMIZER, root, optimizer)
    return state


def load_best(folder: Path, step: int, root: nn.Module) -> None:
    """Puts the weights of `best-<step>` into the root. Raises DataError where they are missing or damaged."""
    best = folder / f"best-{step}"
    open_artifact(best, kind="best", deep=True)
    read_tensors(best / MODEL, stored_tensors(root))


def remove_folder(path: Path) -> None:
    """Removes a published folder; it loses its name first, so that no half of it is ever found under it."""
    waste = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(waste, ignore_errors=True)
    os.rename(path, waste)
    shutil.rmtree(waste)


def remove_waste(folder: Path) -> None:
    """Removes what an interrupted save or removal left."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.name.startswith((SAVING, REMOVING)):
                shutil.rmtree(path)


def retain(folder: Path, limit: int, best_step: int | None) -> None:
    """Keeps the newest `limit` checkpoints; an older one goes only when the newer ones stand with all their files."""
    found = checkpoints(folder)
    for _, path in found[-limit:]:
        open_artifact(path, kind="checkpoint")
    for _, path in found[:-limit]:
        remove_folder(path)
    retain_best(folder, best_step)


def retain_best(folder: Path, best_step: int | None) -> None:
    """Keeps the best weights that the training now speaks of, and those that a kept checkpoint speaks of."""
    wanted = {best_step}
    for _, path in checkpoints(folder):
        wanted.add(json.loads((path / STATE).read_text(encoding="utf-8"))["best_step"])
    for step, path in _numbered(folder, "best"):
        if step not in wanted:
            remove_folder(path)


def better(metric: float, best: float | None) -> bool:
    """Whether an eval_loss is lower than the best so far; one that is not finite never is."""
    return math.isfinite(metric) and (best is None or metric < best)
