"""What a report says, as plain values: the rows of its tables, its samples, and where everything came from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that was measured.

    context  how many tokens it saw at a time when its bits were counted
    stride   by how many tokens these windows moved on, so that every token but a document's first ones had at least
             context − stride before it; None where no text was read
    """

    name: str
    fingerprint: str
    num_parameters: int
    vocab_size: int
    context: int
    notes: Sequence[str] = ()
    stride: int | None = None


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
class LossRow:
    """How well one model predicts one group of texts, in every unit; `kind` is category, source, language or all.

    loss        nats per token; perplexity = e^loss. Both depend on the tokenizer, bits per byte and character do not
    low, high   95 % interval of the bits per byte, over what `unit` says; loss_… and char_… those of the loss and of the
                bits per character
    num_without_context  first tokens that nothing could be asked to predict
    """

    model: str
    kind: str
    group: str
    loss: float
    loss_low: float | None
    loss_high: float | None
    bits_per_token: float
    perplexity: float
    bits_per_byte: float
    low: float | None
    high: float | None
    bits_per_char: float
    char_low: float | None
    char_high: float | None
    unit: str
    num_bytes: int
    num_chars: int
    num_tokens: int
    num_documents: int
    num_without_context: int


@dataclass(frozen=True, slots=True)
class RiseRow:
    """How much more a model needs for one group of texts than the reference does for the same bytes.

    value      bits per byte ÷ the reference's − 1, with its 95 % interval, resampled in pairs
    max_rise   what the recipe allows; None where it says nothing of this group
    """

    model: str
    reference: str
    kind: str
    group: str
    value: float
    low: float | None
    high: float | None
    bits_per_byte: float
    reference_bits_per_byte: float
    unit: str
    max_rise: float | None = None

    @property
    def too_high(self) -> bool:
        """Whether it has risen by more than the recipe allows."""
        return self.max_rise is not None and self.value > self.max_rise


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """One model on one benchmark with so many examples before each question; 95 % Wilson intervals.

    acc       the share of questions whose right answer has the highest summed log-probability; of a cloze, the share whose
              continuation is what greedy decoding gives
    acc_norm  the same with each sum divided by the bytes of its answer; None for a cloze
    chance    what guessing is worth; perplexity   e^(mean −ln p of a continuation), of a cloze only
    gain, gain_low, gain_high   acc less the reference's on the same questions, with its paired interval
    """

    benchmark: str
    model: str
    num_shots: int
    acc: float
    low: float
    high: float
    acc_norm: float | None
    norm_low: float | None
    norm_high: float | None
    num_items: int
    chance: float | None = None
    perplexity: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None


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
ALL_TEXT = "all text"
FORGOTTEN = "FORGOTTEN: "  # how a note about a closed gate begins
EVERYTHING = "all"  # what max_rise calls all text together


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
    """A prompt and what each model made of it; `expected` is "" where nothing is."""

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
    losses: Sequence[LossRow] = ()
    rises: Sequence[RiseRow] = ()
    choices: Sequence[ChoiceRow] = ()
    skills: Sequence[SkillRow] = ()
    preferences: Sequence[PreferenceRow] = ()
    rewards: Sequence[RewardRow] = ()
    judge: str = ""
    reference: str = ""
    samples: Sequence[Sample] = ()
    free: Sequence[Sample] = ()
    continued: Sequence[Sample] = ()
    lineage: Sequence[LineageStep] = ()
    ledger: Sequence[LedgerLine] = ()
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def all_samples(self) -> list[tuple[str, Sequence[Sample]]]:
        """What is shown side by side, under its headings."""
        found = [("Samples", self.samples), ("Free prompts", self.free), ("Continuations", self.continued)]
        return [(heading, samples) for heading, samples in found if samples]

    @property
    def model_names(self) -> list[str]:
        """The models in the order of the recipe."""
        return [model.name for model in self.models]
