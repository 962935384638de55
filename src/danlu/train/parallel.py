"""Several processes, one training: who this process is, what all of them know together, and how weights are split.

Every rank reads the same global batch, cuts it into the same micro-batches and takes every n-th of them, so that no
rank ever waits for data of another and the result is a single process's up to rounding. Weights, gradients and
optimizer states are split by FSDP2. What is exchanged besides tensors is JSON.

    world = World.current()                 # one process, or what torchrun started
    root = shard(root, world)
    mine = world.deal(groups)               # [(group, counts), …], equally many on every rank
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._pytree import SUPPORTED_NODES, register_dataclass

from danlu.core.errors import ConfigError
from danlu.models.freeze import layers_of
from danlu.models.root import ActorCriticReading, ClassReading, ScoreReading, SiteReading

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of this training and this one's place among them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    @classmethod
    def current(cls, device: str | None = None) -> "World":
        """What torchrun's environment says, else a single process. `device`: `cpu` or `cuda`, default what is there."""
        kind = device_kind(device)
        size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        if kind == "cuda" and local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ConfigError(f"process {local} of this machine would train on a CUDA device of its own, and torch finds "
                              f"{found} here", key="device", hint="Use device: cpu or auto, or start fewer processes.")
        if kind == "cuda":
            be_deterministic()
        if size == 1:
            return cls(device=torch.device(kind))
        place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            # other processes wait while the main one prepares data or saves, however long that takes
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=12))
        return cls(dist.get_rank(), dist.get_world_size(), place, init_device_mesh(kind, (size,)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """One JSON value of every rank, in the order of ranks, known to all of them."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = torch.tensor([len(data)], device=self.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        own = torch.full((int(longest),), ord(" "), dtype=torch.uint8, device=self.device)
        own[:len(data)] = data.to(self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return [json.loads(row.cpu().numpy().tobytes()) for row in rows]

    def sum(self, x: float) -> float:
        """The sum over ranks, in double precision and in the same order everywhere."""
        return sum(self.gather(x))

    def sum_each(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over ranks by name; a name that some ranks do not have counts as 0 there."""
        total: dict[str, float] = {}
        for row in self.gather(values):
            for name, value in row.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def agree(self, ok: bool) -> bool:
        """Whether every rank is well, known to all of them."""
        return all(self.gather(ok))

    def barrier(self) -> None:
        """Waits for every rank."""
        self.gather(None)

    def deal(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's share, round robin. Every rank gets equally many: where items run out the last one is given
        again with False, and the caller lets it weigh nothing."""
        rounds = -(-len(items) // self.size)
        return [(items[min(place, len(items) - 1)], place < len(items))
                for place in range(self.rank, rounds * self.size, self.size)]

    def close(self) -> None:
        """Leaves the group of processes; nothing to do for a single one."""
        if self.size > 1 and dist.is_initialized():
            self.barrier()  # nobody leaves while another still talks
            dist.destroy_process_group()


def device_kind(device: str | None) -> str:
    """`cpu` or `cuda`: what was asked for, or what is there."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16_units(kind: str) -> bool:
    """Whether this GPU or x86 processor has units for products in bf16; without them they are emulated, and slow."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def be_deterministic() -> None:
    """Asks CUDA for the same bits every time, where a kernel has a deterministic form; torch warns of the others."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _make_readable() -> None:
    """Lets FSDP2 find the tensors inside a reading, whose gradients tell it that the backward pass begins."""
    for reading in (SiteReading, ScoreReading, ClassReading, ActorCriticReading):
        if reading not in SUPPORTED_NODES:
            register_dataclass(reading)


def shard(root: M, world: World) -> M:
    """The root on this world's device, its weights split over the ranks: each block by itself, then what remains.

    Tied weights stay tied because both users are in the remainder. The root's one forward call gathers them.
    """
    root = root.to(world.device)
    if world.size == 1:
        return root
    _make_readable()
    for block in layers_of(root)[1]:
        fully_shard(block, mesh=world.mesh)
    fully_shard(root, mesh=world.mesh)
    return root


def split_again(root: nn.Module) -> None:
    """Splits what a forward pass without a backward pass has left gathered: the weights outside the blocks.

    Whoever takes parameters into its hands, as an optimizer or a checkpoint does, would otherwise get whole copies that
    the next backward pass throws away.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
