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


ALL_PAIRS = "all pairs"


def system_label(kind: str, name: str) -> str:
    """What a judge or a model is called where both stand beside each other."""
    return f"{name} (judge)" if kind == "judge" and name != "judge" else name


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The share of held-out pairs of one category of which a system prefers the chosen answer, a tie counting half.

    With its 95 % Wilson interval; `kind` is "judge" (by its scores) or "model" (by its log-probabilities).

    margin  the mean difference between chosen and rejected: of scores, or of summed log-probabilities in nats; with its
            95 % interval over pairs
    """

    category: str
    system: str
    kind: str
    value: float
    low: float
    high: float
    num_pairs: int
    margin: float = 0.0
    margin_low: float | None = None
    margin_high: float | None = None


@dataclass(frozen=True, slots=True)
class RewardRow:
    """What one model samples for prompts, one answer each. Intervals are 95 %, over prompts.

    score   the judge's mean score (the scale is the judge's own)
    kl      mean over the answers of log π − log π_ref, summed over the answer's tokens in nats; None: no reference
    exact   the share of exact answers to tasks, with its Wilson interval; None: there was no task
    ended   the share of answers that ended by themselves
    length  mean tokens of an answer, with the one that ends it
    """

    model: str
    score: float
    low: float | None
    high: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    exact: float | None
    exact_low: float | None
    exact_high: float | None
    ended: float
    length: float
    num_answers: int


@dataclass(frozen=True, slots=True)
class Answered:
    """One model's answer to a sample; `right` is None where nothing says what would be right.

    `score` is the judge's; None where nobody judged.
    """

    model: str
    text: str
    right: bool | None
    score: float | None = None


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


# What the values of a curve are.
PER_TOKEN, PER_PAIR, PER_ANSWER = "loss (nats per learned token)", "loss (nats per pair)", "reward per answer"
PER_JUDGED = "loss per judged answer"


@dataclass(frozen=True, slots=True)
class Curve:
    """A model's loss or reward over its steps; `label` is "training", "reward" or names the evaluation.

    `unit` says what the values are, in words that stand beside an axis.
    """

    model: str
    label: str
    steps: Sequence[int]
    values: Sequence[float]
    unit: str = PER_TOKEN


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is written down, in the order in which it is read.

    `judge` and `reference` are the names of the models that scored answers and that KL is measured to; "": none.
    """

    title: str
    fingerprint: str
    models: Sequence[ModelEntry] = ()
    bits: Sequence[BitsRow] = ()
    skills: Sequence[SkillRow] = ()
    preferences: Sequence[PreferenceRow] = ()
    rewards: Sequence[RewardRow] = ()
    judge: str = ""
    reference: str = ""
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
