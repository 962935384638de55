"""Runs: the plan carried out. What is there is reused, what is missing is made, step by step, and every step says why.

A step works in `.work-<fingerprint>`, and its artifact appears under its own name by one rename; then `current` is set
to it. So whatever stops the process, nothing is half-published, and the same command goes on from there.

    artifacts = run(Recipe.load("recipes/quickstart.yaml"))
    artifacts["base"].folder, artifacts["base"].metrics
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import danlu
from danlu.core.artifact import (
    Artifact,
    digest,
    disk_errors,
    fresh_folder,
    hash_files,
    open_artifact,
    publish,
    verify_hashes,
    write_atomic,
)
from danlu.core.errors import ConfigError, DanluError
from danlu.core.processes import refuse_in_worker
from danlu.pipeline.context import STEP, Context, Input, SingleProcess, World, kept_beside
from danlu.pipeline.lock import hold
from danlu.pipeline.plan import Plan, PlannedStep, check, plan
from danlu.pipeline.progress import show_duration, show_fields
from danlu.pipeline.recipe import CURRENT, Recipe

if TYPE_CHECKING:
    from rich.console import Console

MAX_SHOWN_METRICS = 8
T = TypeVar("T")


class Stopped(DanluError):
    """This process is well, but the main one is not; its message is the one to read."""


def run(recipe: Recipe, runs: str | Path = "runs", only: Iterable[str] | None = None,
        console: "Console | None" = None) -> dict[str, Artifact]:
    """Makes what is missing of a recipe and returns the artifact of every step (with `only`: of those steps).

    Raises ConfigError for what cannot be meant or where another process works on the same run, DataError for damaged
    artifacts and a full disk.
    """
    refuse_in_worker()
    wanted = [recipe.step(name).name for name in only] if only is not None else list(recipe.steps)
    with _processes() as world:
        if console is None or not world.is_main:
            from rich.console import Console

            console = Console(quiet=not world.is_main)
        with _lock(Path(runs) / recipe.name, world):
            runner = _Runner(plan(recipe, runs), world, console)
            runner.require_parents(wanted)
            for name in recipe.steps:
                if name in wanted:
                    runner.artifacts[name] = runner.step(runner.plan.steps[name])
            return runner.artifacts


@contextmanager
def _processes() -> Iterator[World]:
    """This process alone, or all that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SingleProcess()
        return
    from danlu.train.parallel import World as Processes

    world = Processes.current()
    yield world
    world.close()


@contextmanager
def _lock(folder: Path, world: World) -> Iterator[None]:
    """The main process holds the lock for all of them."""
    if not world.is_main:
        on_main(world, _nothing)
        yield
        return
    held = hold(folder)
    on_main(world, held.__enter__)
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def _nothing() -> None:
    """What the others do while the main process works."""


def on_main(world: World, action: Callable[[], T]) -> T | None:
    """Lets the main process act while the others wait. Its error stops all: there as itself, elsewhere as Stopped."""
    well = not world.is_main
    result = None
    try:
        if world.is_main:
            result = action()
            well = True
    finally:
        agreed = world.agree(well)
    if not agreed:
        raise Stopped("the main process has stopped")
    return result


class _Runner:
    """One run: the plan, the processes, and what is verified and made so far."""

    def __init__(self, plan: Plan, world: World, console: "Console") -> None:
        self.plan, self.world, self.console = plan, world, console
        self.artifacts: dict[str, Artifact] = {}
        self.verified: set[Path] = set()

    def require_parents(self, wanted: list[str]) -> None:
        """Raises ConfigError where a wanted step reads one that is neither there nor wanted."""
        for name in wanted:
            planned = self.plan.steps[name]
            for text, meaning in planned.step.meanings.items():
                if planned.artifact is None and meaning.kind == STEP and meaning.step not in wanted:
                    parent = self.plan.steps[meaning.step]
                    if parent.artifact is None:
                        raise ConfigError(f"the step “{name}” reads “{text}”, which is not there ({parent.reason})",
                                          where=planned.step.place, hint=f"Run it too: --only {text} --only {name}")

    def step(self, planned: PlannedStep) -> Artifact:
        """Reuses or makes one step's artifact and lets `current` name it."""
        step = planned.step
        reused = self.world.agree(planned.artifact is not None or not self.world.is_main)  # the main one decides
        self.console.rule(f"{step.name} ({step.stage})", align="left", style="dim")
        self.console.print(f"{'reused' if reused else 'runs'}: {planned.reason}", markup=False, highlight=False,
                           soft_wrap=True)
        if reused:
            artifact = open_artifact(planned.folder)
        else:
            started = time.monotonic()
            artifact = self.make(planned)
            self.console.print(_summary(artifact.metrics, time.monotonic() - started), markup=False, highlight=False,
                               soft_wrap=True)
        if self.world.is_main:
            _point(planned.folder)
            if "published" in vars(step.module):
                vars(step.module)["published"](artifact, self.console)
        return artifact

    def make(self, planned: PlannedStep) -> Artifact:
        """Runs the stage and publishes what it leaves."""
        module = planned.step.module
        with disk_errors(planned.work):
            inputs = on_main(self.world, lambda: self.prepare(planned)) or self.inputs(planned)
            context = Context(planned.step.name, planned.step.settings, self.plan.recipe.seed, inputs, planned.work,
                              planned.fingerprint, self.plan.recipe.base, self.world, self.console)
            if vars(module).get("DISTRIBUTED", False):
                # No vote when this fails: another process may be inside an exchange that the vote would be taken for.
                metrics = module.run(context)
                self.world.barrier()
                on_main(self.world, lambda: self.publish(planned, inputs, metrics))
            else:
                on_main(self.world, lambda: self.publish(planned, inputs, module.run(context)))
        return open_artifact(planned.folder)

    def inputs(self, planned: PlannedStep) -> dict[str, Input]:
        """The step's inputs as they are now, with the artifacts of its parents."""
        found = {}
        for text, known in planned.inputs.items():
            if known.kind == STEP:
                step = planned.step.meanings[text].step
                artifact = self.artifacts.get(step) or self.plan.steps[step].artifact
                assert artifact is not None, "parents come first, or are required to be there"
                known = replace(known, artifact=artifact, folder=artifact.folder)
            found[text] = known
        return found

    def prepare(self, planned: PlannedStep) -> dict[str, Input]:
        """Verifies the inputs to the last byte, checks that they fit, and lays out the work folder."""
        inputs = self.inputs(planned)
        self.require_unchanged(planned, inputs)
        for found in inputs.values():
            if found.artifact is not None and found.artifact.folder not in self.verified:
                verify_hashes(found.artifact.folder, found.artifact.manifest["files"])
                self.verified.add(found.artifact.folder)
        check(self.plan.recipe, planned.step, inputs)
        if vars(planned.step.module).get("RESUMES", False):
            planned.work.mkdir(parents=True, exist_ok=True)
        else:
            fresh_folder(planned.work)
        return inputs

    def require_unchanged(self, planned: PlannedStep, inputs: Mapping[str, Input]) -> None:
        """Raises DataError where a file outside is not the one that the plan hashed, or one has come or gone."""
        for text, found in inputs.items():
            self.plan.contents.unchanged(found, planned.step.meanings[text], self.plan.recipe.base)

    def publish(self, planned: PlannedStep, inputs: Mapping[str, Input], metrics: Mapping[str, Any]) -> None:
        """Finishes the work folder. The files outside must still be the ones that were hashed."""
        self.require_unchanged(planned, inputs)
        publish(planned.work, planned.folder, kind=planned.step.module.KIND, fingerprint=planned.fingerprint,
                parents={text: found.fingerprint for text, found in inputs.items()}, config=planned.config,
                metrics=metrics, code=code_version())
        shutil.rmtree(kept_beside(planned.work), ignore_errors=True)
        self.verified.add(planned.folder)  # every byte was read for the manifest a moment ago


def _point(folder: Path) -> None:
    """Lets `current` name this artifact."""
    pointer = folder.parent / CURRENT
    if not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != folder.name:
        with disk_errors(pointer):
            write_atomic(pointer, folder.name + "\n")


def _summary(metrics: Mapping[str, Any], seconds: float) -> str:
    """A step's numbers on one line."""
    shown = {name: value for name, value in metrics.items()
             if isinstance(value, int | float | str) and not isinstance(value, bool)}
    words = show_fields(dict(list(shown.items())[:MAX_SHOWN_METRICS]))
    return f"done in {show_duration(seconds)}" + (f": {words}" if words else "")


@cache
def code_version() -> str:
    """danlu's version and a hash of its sources, by which an artifact tells what code made it."""
    root = Path(danlu.__file__).parent
    sources = sorted(root.rglob("*.py"))
    names = [path.relative_to(root).as_posix() for path in sources]
    return f"{danlu.__version__}+{digest(list(zip(names, hash_files(sources))))[:12]}"
