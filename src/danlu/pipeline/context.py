"""What a stage and the pipeline say to each other.

A stage is a module with KIND, SCHEMA, Settings, references, forecast and run (`StageModule` below). It names what it
reads as References; the pipeline resolves each to an Input and hands all of them over by the reference's text. Before
anything runs the same Inputs, some still without a folder, go to `forecast`; when the step runs they go to `run` inside
a Context, every one of them verified.

    def references(settings):
        return [Reference(("dataset", i), text, ("corpus", "files")) for i, text in enumerate(settings.dataset)]

    def run(context: Context) -> dict:
        corpus = context.inputs["corpus"].require_folder()
        with context.progress("training", total=100) as bar:
            bar.update(10, loss=2.5, tokens_per_second=4000)
        return {"loss": 2.5}
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from danlu.core.artifact import Artifact
from danlu.core.config import Config
from danlu.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# What a reference may mean.
STEP = "step"  # an artifact that another step makes ("corpus", "tokenizer", "model", "report")
FILES = "files"  # a local file, folder or glob, or package:NAME/path: `files` lists what is behind it
DOCSTRINGS = "docstrings"  # docstrings:NAME,NAME: `files` lists the packages' sources
TASK = "task"  # task:NAME: no files
HUB = "hub"  # org/name on the model hub: no files
OUTSIDE = (FILES, DOCSTRINGS, TASK, HUB)


@dataclass(frozen=True, slots=True)
class Reference:
    """One thing that a step reads.

    key    where it stands in the step's settings, so that an error can name file and line: ("dataset", 0)
    text   what the user wrote there: `base`, `texts/`, `package:NAME/path`, `task:skills`, `org/name`
    kinds  what it may mean: kinds of artifacts ("corpus", "model", …) and any of FILES, DOCSTRINGS, TASK, HUB.
           A local folder that is itself a finished artifact is accepted under the artifact's kind; any other local
           path (a model folder that somebody else saved, say) only where FILES is among the kinds.
    label  the text itself is part of what is made: a document's source, by which it may be held out or sampled
    """

    key: tuple[str | int, ...]
    text: str
    kinds: tuple[str, ...]
    label: bool = False

    @property
    def is_data(self) -> bool:
        """Whether rows are read from it, not a model or a tokenizer."""
        return not {"model", "reward_model", "tokenizer"} & set(self.kinds)


@dataclass(frozen=True, slots=True)
class Amount:
    """A forecast number; `exact` is false where it depends on something that has not run (printed with ≈)."""

    value: float
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a step will take, as far as it can be known before; None where it means nothing for the stage.

    tokens   that the stage leaves (corpus) or trains on (pt, sft: all epochs together)
    steps    optimizer steps
    flops    floating point operations, forward and backward together
    memory   peak bytes on one device
    seconds  wall clock on this machine
    notes    sentences for the reader of the plan
    facts    numbers and words for the forecasts of later steps: {"vocab_size": 4096, "num_examples": 120, …}
    """

    tokens: Amount | None = None
    steps: Amount | None = None
    flops: Amount | None = None
    memory: Amount | None = None
    seconds: Amount | None = None
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def times(self, **factors: float) -> "Forecast":
        """The same with some of its amounts multiplied, as far as they are known: times(flops=2, seconds=2)."""
        known = {name: amount for name in factors if (amount := getattr(self, name)) is not None}
        return replace(self, **{name: replace(amount, value=amount.value * factors[name])
                                for name, amount in known.items()})


@dataclass(frozen=True, slots=True)
class Input:
    """What a reference means.

    text         the reference's text
    kind         STEP, FILES, DOCSTRINGS, TASK or HUB
    produces     the artifact's kind ("corpus", "model", …) for steps and for local folders that are artifacts, else ""
    fingerprint  the parent's fingerprint, or the hash of the content behind the reference
    folder       the artifact's folder, or the local folder itself; None for files and while the step has not run
    artifact     the verified artifact; None where there is none (yet)
    files        the concrete files behind FILES and DOCSTRINGS, sorted
    stage, settings, forecast    of the step referred to, for forecasts and checks; "" and None outside steps
    """

    text: str
    kind: str
    fingerprint: str
    produces: str = ""
    folder: Path | None = None
    artifact: Artifact | None = None
    files: Sequence[Path] = ()
    stage: str = ""
    settings: Config | None = None
    forecast: Forecast | None = None

    def require_folder(self) -> Path:
        """The folder to read from. Raises ConfigError where the reference has none (a hub id, a single file)."""
        if self.folder is None:
            raise ConfigError(f"“{self.text}” is no folder", hint="Name a step, or a local folder.")
        return self.folder


class World(Protocol):
    """The processes that work on one run together; a single one outside torchrun."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def barrier(self) -> None: ...
    def sum(self, x: float) -> float: ...
    def agree(self, ok: bool) -> bool: ...


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """The World of one process, without torch."""

    rank: int = 0
    size: int = 1
    is_main: bool = True

    def barrier(self) -> None:
        """Nobody to wait for."""

    def sum(self, x: float) -> float:
        """The sum over one process."""
        return x

    def agree(self, ok: bool) -> bool:
        """Whether every process is well: this one is all of them."""
        return ok


def kept_beside(work: Path) -> Path:
    """Where a stage keeps what survives an interruption of the work in that folder."""
    return work.with_name(f"{work.name}.keep")


class Progress(Protocol):
    """What `Context.progress` gives inside its `with`."""

    def go_on(self, done: float) -> None:
        """So much was done earlier, and says nothing about how long the rest takes; before the first `update`."""

    def update(self, done: float, **fields: float | str) -> None:
        """`done` counts from the start, not from the last call; fields (loss=…, tokens_per_second=…) are shown."""


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a running stage may use.

    step         the step's name in the recipe
    settings     the stage's own Settings
    seed         the recipe's seed
    inputs       by the reference's text; artifacts among them are verified to the last byte
    work         the folder to write into; empty at the start, unless the stage says RESUMES = True
    fingerprint  of the artifact in the making
    base         the recipe's folder, against which relative paths are tried after the current directory
    world        the processes of this run; only the main one writes, except where a stage says DISTRIBUTED = True
    console      where to print; silent on every process but the main one
    watch        puts itself between the records and their examples, to look at both (`danlu check`)
    """

    step: str
    settings: Any
    seed: int
    inputs: Mapping[str, Input]
    work: Path
    fingerprint: str
    base: Path
    world: World
    console: "Console"
    watch: Callable[[Any], Any] | None = None

    @property
    def keep(self) -> Path:
        """A folder beside `work` for what an interruption must not cost, such as checkpoints; gone after publication."""
        return kept_beside(self.work)

    def progress(self, description: str, total: float | None = None) -> AbstractContextManager[Progress]:
        """A progress bar with the time left; sparse plain lines where the output is no terminal."""
        from danlu.pipeline.progress import show_progress

        return show_progress(self.console, description, total)


class StageModule(Protocol):
    """What every module in `pipeline/stages/` defines.

    It may also define RESUMES = True (its work folder survives an interruption), DISTRIBUTED = True (all processes run
    it), `check(settings, inputs)`, which is called when planning and raises ConfigError where steps do not fit, and
    `published(artifact, console)`, which is called when the step's artifact is there, made or reused.
    """

    KIND: str
    SCHEMA: int
    Settings: type[Config]

    def references(self, settings: Any) -> list[Reference]: ...
    def forecast(self, settings: Any, inputs: Mapping[str, Input]) -> Forecast: ...
    def run(self, context: Context) -> dict[str, Any]: ...
