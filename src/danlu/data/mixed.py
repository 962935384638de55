"""Loaders that mix: which examples belong to which step, where shares, buckets or phases are asked for.

Each category is an endless stream: its examples in an order drawn for (seed, category, bin, pass), pass after pass, so that
what runs out comes again in another order. The streams are merged by when each example is due. With S_g tokens of category
g learned so far and its share s_g, the example that would bring S_g to S_g + t is due when the whole mix has learned

    v = (S_g + t/2) / s_g

tokens; so at any v every category is within half an example of its course s_g·v. Nothing is drawn to decide which category
comes next. Steps are cut from the merged order as the Loader cuts them, so a step is near its shares too, and the position
is still one integer. What a bucket or a phase leaves of an example is carried into the next, so errors do not add up.

    loader = mixed(MixConfig(shares={"zh": 0.7, "en": 0.3}), store, seed=1, max_steps=600, sizes=settings.batch_size())
    loader.batch(599)
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from danlu.core.errors import DataError
from danlu.data.loader import Loader, StepBatch, cut, require_examples
from danlu.data.mix import Groups, MixConfig, asked_of, bins_of, passes_of
from danlu.data.store import ExampleStore

MORE = 1.25  # how much further to merge than was estimated


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """Where every category stands between two stretches of a run.

    served  float64 [groups]: learned tokens so far
    asked   float64 [groups]: learned tokens that there should have been
    drawn   int64 [groups, bins]: examples that each bin has given
    """

    served: np.ndarray
    asked: np.ndarray
    drawn: np.ndarray


class Streams:
    """The endless streams of the examples of each group, by bin; a group that is not `used` is not cut."""

    def __init__(self, groups: Groups, used: np.ndarray, num_bins: int, seed: int) -> None:
        self.groups, self.seed = groups, seed
        nothing = [np.zeros(0, np.int64)] * num_bins
        self.bins = [bins_of(members, groups.targets, num_bins, name) if takes_part else nothing
                     for name, members, takes_part in zip(groups.names, groups.members(), used, strict=True)]
        self.bin_sizes = np.array([[groups.targets[members].sum() for members in row] for row in self.bins], np.float64)
        nothing_in = np.flatnonzero(used & (self.bin_sizes == 0).any(1))
        if len(nothing_in):  # it would be an endless stream of nothing
            raise DataError(f"“{groups.names[nothing_in[0]]}” has a bucket in which nothing is learned",
                            hint="Set fewer buckets, or give it more data.")

    def start(self) -> Course:
        """Where everything stands before the first step."""
        groups, bins = self.bin_sizes.shape
        return Course(np.zeros(groups), np.zeros(groups), np.zeros((groups, bins), np.int64))

    def order(self, group: int, place: int, number: int) -> np.ndarray:
        """The examples of a bin as pass 0, 1, 2, … over it takes them."""
        key = hashlib.sha256(repr((self.seed, "mix", self.groups.names[group], place, number)).encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8")))
        return generator.permutation(self.bins[group][place])

    def ahead(self, group: int, place: int, drawn: int, tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """The next examples of a bin and the middle of each on the axis of learned tokens; all those below `tokens`."""
        number, offset = divmod(drawn, len(self.bins[group][place]))
        parts = [self.order(group, place, number)[offset:]]
        found = int(self.groups.targets[parts[0]].sum())
        while found < tokens:
            number += 1
            parts.append(self.order(group, place, number))
            found += int(self.bin_sizes[group, place])
        indices = np.concatenate(parts)
        targets = self.groups.targets[indices]
        middles = np.cumsum(targets) - targets / 2
        count = int(np.searchsorted(middles, tokens))
        return indices[:count], middles[:count]

    def merge(self, course: Course, place: int, rates: np.ndarray, until: float) -> tuple[np.ndarray, np.ndarray]:
        """The examples of one bucket by when they are due, and when that is; all that are due before `until`.

        rates  tokens of each group per unit of time
        """
        found, due = [], []
        for group in np.flatnonzero(rates > 0).tolist():
            behind = course.asked[group] - course.served[group]
            own, middles = self.ahead(group, place, int(course.drawn[group, place]), behind + rates[group] * until)
            found.append(own)
            due.append((middles - behind) / rates[group])
        indices, times = np.concatenate(found), np.concatenate(due)
        by_time = np.argsort(times, kind="stable")
        return indices[by_time], times[by_time]

    def after(self, course: Course, place: int, taken: np.ndarray, asked: np.ndarray) -> Course:
        """Where everything stands after these examples were taken from one bucket, of which so many tokens were asked."""
        of = self.groups.of[taken]
        drawn = course.drawn.copy()
        drawn[:, place] += np.bincount(of, minlength=len(drawn))
        served = course.served + np.bincount(of, self.groups.targets[taken], len(drawn))
        return Course(served, course.asked + asked, drawn)

    def standing(self, course: Course, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Learned tokens of each group after each batch, float64 [batches, groups]."""
        count = len(self.groups.names)
        table = np.zeros((len(bounds) - 1, count))
        batch = np.searchsorted(bounds, np.arange(bounds[-1]), side="right") - 1
        taken = order[:bounds[-1]]
        np.add.at(table, (batch, self.groups.of[taken]), self.groups.targets[taken])
        return course.served + np.cumsum(table, axis=0)

    def told(self, learned: np.ndarray) -> dict[str, float]:
        """What a line of the log says of how the data have been mixed so far."""
        total = learned.sum()
        own = dict(zip(self.groups.names, learned.tolist(), strict=True))
        return {**{f"share/{name}": float(tokens / total) for name, tokens in own.items()},
                **{f"epochs/{name}": tokens / self.groups.sizes[name] for name, tokens in own.items()}}


class MixedEpochs(Loader):
    """A run stated in epochs: each is one sweep over the buckets, and its last batch may be smaller."""

    def __init__(self, config: MixConfig, store: ExampleStore, groups: Groups, *, seed: int,
                 global_batch_size: int | None = None, global_batch_tokens: int | None = None) -> None:
        super().__init__(store, seed=seed, global_batch_size=global_batch_size, global_batch_tokens=global_batch_tokens)
        self.config, self.groups = config, groups
        self.passes = groups.array(passes_of(config, groups.sizes))
        self.streams = Streams(groups, self.passes > 0, config.buckets, seed)
        self.courses = [self.streams.start()]  # before each epoch
        self._standing: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, bucket after bucket."""
        while len(self.courses) <= epoch:
            self.order(len(self.courses) - 1)
        course, found = self.courses[epoch], []
        for place in range(self.config.buckets):
            asked = self.passes * self.streams.bin_sizes[:, place]
            taken, _ = self.streams.merge(course, place, asked, 1.0)
            course = self.streams.after(course, place, taken, asked)
            found.append(taken)
        if not any(map(len, found)):
            raise DataError("an epoch of this mix holds not one example", where=str(self.store.folder))
        if len(self.courses) == epoch + 1:
            self.courses.append(course)
        return np.concatenate(found)

    def batch(self, step: int) -> StepBatch:
        """The examples of step 0, 1, 2, …"""
        data = super().batch(step)
        epoch, place = self.place(step)
        if self._standing is None or self._standing[0] != epoch:
            self._standing = (epoch, self.streams.standing(self.courses[epoch], *self._load_epoch(epoch)))
        return StepBatch(data.epoch, data.indices, data.examples, standing=self.streams.told(self._standing[1][place]))


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """The merged order of one stretch of a run, cut into its steps, and how the data stand after each."""

    order: np.ndarray
    bounds: np.ndarray
    standing: np.ndarray


class MixedRun:
    """A run stated in steps: each phase has its own shares, and goes through the buckets once."""

    stride = 1

    def __init__(self, config: MixConfig, store: ExampleStore, groups: Groups, *, seed: int, max_steps: int,
                 global_batch_size: int | None = None, global_batch_tokens: int | None = None) -> None:
        self.config, self.store, self.groups = config, store, groups
        self.size, self.tokens, self.max_steps = global_batch_size, global_batch_tokens, max_steps
        self.shares = [groups.array(shares) for shares in asked_of(config, groups.sizes)]
        self.streams = Streams(groups, np.sum(self.shares, axis=0) > 0, config.buckets, seed)
        self.borders = config.borders(max_steps)
        self.courses = [self.streams.start()]  # before each stretch
        self._stretch: tuple[int, Stretch] | None = None

    def num_steps(self, num_epochs: float) -> int:
        """The steps of the run, which is not stated in epochs."""
        return self.max_steps

    def stretch(self, number: int) -> Stretch:
        """A stretch of the run; those before it are merged first, where that has not been done."""
        while len(self.courses) <= number:
            self._merge(len(self.courses) - 1)
        if self._stretch is None or self._stretch[0] != number:
            self._stretch = (number, self._merge(number))
        return self._stretch[1]

    def _merge(self, number: int) -> Stretch:
        start, end, phase, place = self.borders[number]
        course, shares, steps = self.courses[number], self.shares[phase], end - start
        until = self._estimate(shares, steps)
        while True:
            order, due = self.streams.merge(course, place, shares, until)
            bounds = cut(order, self.store.lengths, self.size, self.tokens)
            if len(bounds) > steps + 1:  # one batch more has begun, so that these are whole
                break
            until *= 2
        bounds = bounds[:steps + 1]
        taken = order[:bounds[-1]]
        if len(self.courses) == number + 1:
            self.courses.append(self.streams.after(course, place, taken, shares * due[bounds[-1]]))
        return Stretch(taken, bounds, self.streams.standing(course, taken, bounds))

    def _estimate(self, shares: np.ndarray, steps: int) -> float:
        """About how many tokens so many steps learn."""
        means = self.groups.array(self.groups.sizes) / np.bincount(self.groups.of, minlength=len(shares))
        if self.size is not None:
            return MORE * (steps + 1) * self.size / float((shares / means).sum())
        assert self.tokens is not None
        return MORE * (steps + 1) * self.tokens

    def _find(self, step: int) -> tuple[Stretch, int]:
        assert 0 <= step < self.max_steps, "the run has no such step"
        number = bisect_right([start for start, *_ in self.borders], step) - 1
        return self.stretch(number), step - self.borders[number][0]

    def indices(self, step: int) -> np.ndarray:
        """Which examples step 0, 1, 2, … takes."""
        stretch, place = self._find(step)
        return stretch.order[stretch.bounds[place]:stretch.bounds[place + 1]]

    def batch(self, step: int) -> StepBatch:
        """The examples of step 0, 1, 2, …; `epoch` counts as one pass as many learned tokens as the data hold."""
        indices = self.indices(step)
        stretch, place = self._find(step)
        learned = stretch.standing[place]
        return StepBatch(float(learned.sum() / sum(self.groups.sizes.values())), indices,
                         [self.store[int(index)] for index in indices], standing=self.streams.told(learned))


Mixed = MixedEpochs | MixedRun


def mixed(config: MixConfig, store: ExampleStore, *, seed: int, max_steps: int | None,
          sizes: Mapping[str, int | None]) -> Mixed:
    """The loader of a mix. Raises DataError where the data do not hold what it names, or too little of it.

    sizes  the size of a global batch, as the Loader takes it
    """
    require_examples(store)
    groups = Groups.of_mix(store, config)
    for name, size in groups.sizes.items():
        if size == 0:
            raise DataError(f"“{name}” holds nothing to learn, so it can have no share", where=str(store.folder))
    if max_steps is None:
        return MixedEpochs(config, store, groups, seed=seed, **sizes)
    return MixedRun(config, store, groups, seed=seed, max_steps=max_steps, **sizes)
