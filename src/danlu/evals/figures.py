"""What a report says, as plain values: the rows of its tables, its samples, and where everything came from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that was measured. `context` is how many tokens it saw at a time when its bits were counted."""

    name: str
    fingerprint: str
    num_parameters: int
    vocab_size: int
    context: int
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class BitsRow:
    """Bits per byte of one system on one category; `kind` is "model" or "baseline"; no interval for compressors."""

    category: str
    system: str
    kind: str
    value: float
    low: float | None
    high: float | None
    num_bytes: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class SkillRow:
    """The share of a task's held-out prompts that a model answered exactly, with its 95 % Wilson interval."""

    task: str
    model: str
    value: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class Answered:
    """One model's answer to a sample; `right` is None where nothing says what would be right."""

    model: str
    text: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what each model made of it; `expected` is "" for a free prompt."""

    task: str
    prompt: str
    expected: str
    answers: Sequence[Answered]


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One artifact that the report rests on, its parents by their short fingerprints, and its metrics in words."""

    step: str
    kind: str
    fingerprint: str
    parents: Sequence[str]
    summary: str


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One station of one artifact's ledger: what came, what went, and in words what was added and dropped."""

    step: str
    station: str
    came: Mapping[str, int]
    went: Mapping[str, int]
    changes: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A model's loss over its steps; `label` is "training" or names the evaluation."""

    model: str
    label: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is written down, in the order in which it is read."""

    title: str
    fingerprint: str
    models: Sequence[ModelEntry] = ()
    bits: Sequence[BitsRow] = ()
    skills: Sequence[SkillRow] = ()
    samples: Sequence[Sample] = ()
    free: Sequence[Sample] = ()
    lineage: Sequence[LineageStep] = ()
    ledger: Sequence[LedgerLine] = ()
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def model_names(self) -> list[str]:
        """The models in the order of the recipe."""
        return [model.name for model in self.models]
