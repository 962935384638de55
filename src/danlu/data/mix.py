"""What a mix asks for: which categories or sources, in which shares of the learned tokens, in which order, how long.

Shares count tokens that are learned, not rows: a category of short rows gets as much of the gradient as one of long rows.
They are stated in one of three ways:

    mix: {shares: {zh: 0.7, en: 0.3}}      the parts themselves; 0 leaves a category out
    mix: {epochs: {zh: 2, en: 0.5}}        passes over each category, which also say how long the run is
    mix: {temperature: 3}                  shares ∝ tokens^(1/T) (Raffel et al. 2020, section 3.5.2): 1 takes the data as
                                           they are, a large T takes all categories alike

`buckets: N` cuts every category, in the order of its data, into N bins of equally many learned tokens; bucket k takes bin k
of every category, buckets follow one another, and only inside one the order is drawn. `phases` is a list of mixes, one
after the other. How examples are drawn by all this is `danlu.data.mixed`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from danlu.core.config import Config, free
from danlu.core.errors import DataError, nearest
from danlu.data.store import ExampleStore

TOLERANCE = 0.01  # of the sum of shares, which people round
Part = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Table = Mapping[str, float]


class ShareConfig(Config):
    """One table of shares, or the temperature that makes one."""

    shares: dict[str, Part] | None = Field(None, description="share of the learned tokens, by category; they sum to 1")
    temperature: float | None = Field(None, description="shares ∝ tokens^(1/temperature); 1: as the data are")

    @field_validator("shares")
    @classmethod
    def _shares_are_whole(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and abs(sum(value.values()) - 1) > TOLERANCE:
            raise ValueError(f"shares that sum to 1; these sum to {sum(value.values()):g}")
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature_flattens(cls, value: float | None) -> float | None:
        if value is not None and not value >= 1:
            raise ValueError("at least 1: shares ∝ tokens^(1/temperature), so an exponent of 0.7 is a temperature of 1.43")
        return value


class PhaseConfig(ShareConfig):
    """A part of the run with shares of its own; its length in steps, or as a part of the run."""

    name: str = free("", description="how tables call it; default: its number")
    steps: int | None = Field(None, ge=1, description="optimizer steps; the last phase takes those that are left")
    ratio: float | None = Field(None, gt=0, le=1, description="part of the run's steps; instead of steps")

    @model_validator(mode="after")
    def _phase_is_one(self) -> "PhaseConfig":
        if self.steps is not None and self.ratio is not None:
            raise ValueError("steps and ratio cannot both be set")
        if (self.shares is None) == (self.temperature is None):
            raise ValueError("a phase needs shares or a temperature, and only one of them")
        return self


class MixConfig(ShareConfig):
    """How a step mixes its data."""

    by: Literal["category", "source"] = Field(
        "category", description="what is mixed: categories, or sources (then names may be patterns with * and ?)")
    epochs: dict[str, Part] | None = Field(None, description="passes over each category, instead of num_train_epochs")
    buckets: int = Field(1, ge=1, description="bins of each category; bucket k takes bin k of all, in order")
    phases: list[PhaseConfig] = Field([], description="mixes one after the other, instead of shares")
    max_epochs: float | None = free(None, gt=0, description="stop before training if a category would be seen more often")

    @model_validator(mode="after")
    def _mix_is_one(self) -> "MixConfig":
        stated = [name for name in ("shares", "epochs", "temperature", "phases") if getattr(self, name)]
        if len(stated) > 1:
            raise ValueError(f"{stated[0]} and {stated[1]} cannot both be set")
        if not stated and self.buckets == 1:
            raise ValueError("a mix needs shares, epochs, a temperature, phases or buckets")
        if self.epochs is not None and not any(self.epochs.values()):
            raise ValueError("epochs that are all 0 leave nothing to train on")
        for phase in self.phases[:-1]:
            if phase.steps is None and phase.ratio is None:
                raise ValueError("only the last phase may leave out steps and ratio; it takes the steps that are left")
        return self

    @property
    def tables(self) -> list[ShareConfig]:
        """Each phase's table of shares; a mix without phases is one phase."""
        return [*self.phases] if self.phases else [self]

    @property
    def takes_all(self) -> bool:
        """Whether some part of the mix takes categories without naming them."""
        return not self.names() or any(table.temperature is not None for table in self.tables)

    def names(self) -> list[str]:
        """The categories or patterns that are named, each once."""
        tables: list[Table] = [self.epochs or {}, *(table.shares or {} for table in self.tables)]
        return list(dict.fromkeys(name for table in tables for name in table))

    def check_length(self, max_steps: int | None, has_num_epochs: bool) -> None:
        """Raises ValueError where the step's other settings say something else of how long to train."""
        if self.epochs is not None and (max_steps is not None or has_num_epochs):
            other = "num_train_epochs" if max_steps is None else "max_steps"
            raise ValueError(f"mix.epochs say how long to train, and so does {other}: leave one of them out")
        if self.phases and max_steps is None:
            raise ValueError("mix.phases are parts of max_steps: set it")
        if max_steps is not None:
            self.borders(max_steps)

    def borders(self, max_steps: int) -> list[tuple[int, int, int, int]]:
        """(first step, step after the last, phase, bucket) of each stretch of a run of so many steps.

        Every phase goes through all buckets. Raises ValueError where one would have no step, or the phases do not fill
        the run.
        """
        found = []
        for phase, (start, end) in enumerate(pairwise(self.phase_ends(max_steps))):
            if end - start < self.buckets:
                who = f"phase {self.phase_name(phase)}" if self.phases else "the run"
                raise ValueError(f"{who} has {max(0, end - start)} of {max_steps} steps and needs at least {self.buckets}" +
                                 (", one for each bucket" if self.buckets > 1 else ""))
            cuts = [start + round(bucket * (end - start) / self.buckets) for bucket in range(self.buckets + 1)]
            found += [(first, after, phase, bucket) for bucket, (first, after) in enumerate(pairwise(cuts))]
        return found

    def phase_ends(self, max_steps: int) -> list[int]:
        """Where the phases begin in the run, and its end."""
        ends, told = [0], 0.0
        for phase in self.phases:
            told += phase.steps or (phase.ratio or 0) * max_steps
            takes_the_rest = phase.steps is None and phase.ratio is None
            ends.append(max_steps if takes_the_rest else round(told))
        if not self.phases:
            ends.append(max_steps)
        if ends[-1] != max_steps:
            raise ValueError(f"the phases take {ends[-1]} of the {max_steps} steps; leave steps and ratio out of the last "
                             "one, and it takes what is left")
        return ends

    def phase_name(self, number: int) -> str:
        """How tables call a phase."""
        return (self.phases[number].name if self.phases else "") or str(number + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """What is mixed: the examples of a store in disjoint groups, in the order of their names.

    of       int64 [number of examples]: each example's group
    targets  int64 [number of examples]: its learned tokens
    sizes    learned tokens of each group
    """

    names: list[str]
    of: np.ndarray
    targets: np.ndarray
    sizes: dict[str, float]

    @classmethod
    def of_mix(cls, store: ExampleStore, config: MixConfig | None) -> "Groups":
        """The examples by category, or by the pattern that names their source; what is not named is a group by itself.

        Raises DataError where a name is nobody's or a label is not named.
        """
        label: Literal["category", "source"] = "category" if config is None else config.by
        names = config.names() if config is not None else []
        found = store.labels(label)
        if label == "category" or not names:
            owner = {text: text for text in found}
            for name in names:
                if name not in owner:
                    raise _unknown(f"no example is of the {label} “{name}”", name, found)
        else:
            owner = {text: _pattern_of(text, names) for text in found}
            for name in set(names) - set(owner.values()):
                raise _unknown(f"no source fits “{name}”", name, found)
        for text in found:
            if config is not None and not config.takes_all and owner[text] not in names:
                raise DataError(f"the data hold the {label} “{text}”, which the mix does not name",
                                hint=f"Give it a share; “{text}: 0” leaves it out.")
        groups = sorted(set(owner.values()))
        number = np.array([groups.index(owner[text]) for text in found], np.int64)
        of = number[store.label_indices(label)]
        targets = store.targets.astype(np.int64)
        sizes = dict(zip(groups, np.bincount(of, targets, len(groups)).tolist(), strict=True))
        return cls(groups, of, targets, sizes)

    def array(self, values: Mapping[str, float]) -> np.ndarray:
        """A value of each group, float64 [number of groups]."""
        return np.array([values[name] for name in self.names], np.float64)

    def members(self) -> Iterator[np.ndarray]:
        """The examples of each group, in their order."""
        for group in range(len(self.names)):
            yield np.flatnonzero(self.of == group)


def _unknown(message: str, name: str, found: Sequence[str]) -> DataError:
    close = nearest(name, found)
    more = ", ".join(sorted(found)[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    return DataError(message, hint=(f"Did you mean “{close}”? " if close else "") + f"The data hold: {more}.")


def _pattern_of(source: str, patterns: Sequence[str]) -> str:
    if source in patterns:  # a name with brackets, which as a pattern would not fit itself
        return source
    fitting = [pattern for pattern in patterns if fnmatchcase(source, pattern)]
    if len(fitting) > 1:
        raise DataError(f"the source “{source}” fits both “{fitting[0]}” and “{fitting[1]}”",
                        hint="Each source belongs to one name of the mix.")
    return fitting[0] if fitting else source


def shares_of(config: ShareConfig, sizes: Table) -> dict[str, float]:
    """The share of each of these categories, which sum to 1; without a table as the data are.

    sizes  learned tokens by category
    """
    raw = {name: size ** (1 / (config.temperature or 1.0)) if config.shares is None else config.shares.get(name, 0.0)
           for name, size in sizes.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def passes_of(config: MixConfig, sizes: Table) -> dict[str, float]:
    """How often each of these categories is passed over in one pass over the mix.

    With `epochs` as they say; else one pass learns as many tokens N as the categories with a share s hold together, so
    that a category of N_g tokens is passed s·N / N_g times.
    """
    if config.epochs is not None:
        return {name: config.epochs.get(name, 0.0) for name in sizes}
    if config.shares is None and config.temperature in (None, 1):
        return dict.fromkeys(sizes, 1.0)
    shares = shares_of(config, sizes)
    total = sum(size for name, size in sizes.items() if shares[name] > 0)
    return {name: shares[name] * total / size for name, size in sizes.items()}


def asked_of(config: MixConfig, sizes: Table) -> list[dict[str, float]]:
    """The shares of each phase; of a mix stated in epochs, those that follow."""
    if config.epochs is None:
        return [shares_of(table, sizes) for table in config.tables]
    tokens = {name: passes * sizes[name] for name, passes in passes_of(config, sizes).items()}
    return [{name: value / sum(tokens.values()) for name, value in tokens.items()}]


def bins_of(members: np.ndarray, targets: np.ndarray, count: int, name: str) -> list[np.ndarray]:
    """A group's examples, in their order, cut into bins of about equally many learned tokens; none is empty.

    An example goes where its middle falls. Raises DataError where there are fewer examples than bins.
    """
    if len(members) < count:
        raise DataError(f"“{name}” has {len(members)} examples, which cannot fill {count} buckets",
                        hint="Set fewer buckets, or give it more data.")
    ends = np.cumsum(targets[members])
    middles = ends - targets[members] / 2
    bounds = np.searchsorted(middles, ends[-1] * np.arange(count + 1) / count)
    for place in range(1, count):  # one long example may be worth several bins
        bounds[place] = min(max(bounds[place], bounds[place - 1] + 1), len(members) - (count - place))
    bounds[0], bounds[-1] = 0, len(members)
    return [members[start:end] for start, end in pairwise(bounds)]
