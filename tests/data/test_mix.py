"""Mixes: every category keeps to its course of learned tokens, buckets and phases keep their order, and nothing is lost."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.data.loader import Loader
from danlu.data.mix import MixConfig, asked_of, bins_of, passes_of
from danlu.data.mixed import Mixed, MixedEpochs, MixedRun, mixed
from danlu.data.shares import require_epochs, share_account
from danlu.data.store import ExampleStore, write_examples

VOCAB = 50


def store_of(folder: Path, lengths: dict[str, Sequence[int]], sources: int = 1) -> ExampleStore:
    """Of each category, examples that learn so many tokens each, in turns, so that no category lies in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted((place / len(own), name, number, place)
                  for name, own in lengths.items() for place, number in enumerate(own))
    write_examples(folder, [
        Example([1], [Branch(np.full(number, 3))], f"{name}/{place % sources}.txt", name, f"{name}{place}")
        for _, name, number, place in rows], VOCAB)
    return ExampleStore(folder)


def loader_of(config: MixConfig, store: ExampleStore, steps: int | None = None, size: int | None = 7,
              tokens: int | None = None, seed: int = 5) -> Mixed:
    sizes = {"global_batch_size": size, "global_batch_tokens": tokens}
    return mixed(config, store, seed=seed, max_steps=steps, sizes=sizes)


def drawn(loader: Mixed | Loader, steps: int) -> list[np.ndarray]:
    return [loader.indices(step) for step in range(steps)]


def labels(store: ExampleStore, indices: Sequence[int] | np.ndarray) -> list[str]:
    return [store[int(index)].category for index in indices]


def learned(store: ExampleStore, indices: np.ndarray) -> dict[str, int]:
    found = dict.fromkeys(store.categories, 0)
    for index, name in zip(indices, labels(store, indices), strict=True):
        found[name] += int(store.targets[index])
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    """Long and short examples: 60 of zh, 24 of en, 9 of qa."""
    rng = np.random.default_rng(1)
    return store_of(tmp_path_factory.mktemp("mix"), {"zh": rng.integers(1, 12, 60), "en": rng.integers(10, 60, 24),
                                                     "qa": rng.integers(1, 4, 9)}, sources=3)


# The worked example ------------------------------------------------------------------------------------------------------


def test_bucket_k_is_bin_k_of_every_category(tmp_path: Path) -> None:
    """Three sub-datasets in three bins each: every bucket holds one bin of each, and the buckets keep their order."""
    store = store_of(tmp_path, {"sports": [2] * 6, "riddle": [1] * 3, "history": [4, 4, 4]})
    loader = loader_of(MixConfig(buckets=3), store, size=4)
    assert isinstance(loader, MixedEpochs)
    for epoch in (0, 1):
        buckets = np.split(loader.order(epoch), 3)
        names = [sorted(store[int(index)].id for index in bucket) for bucket in buckets]
        assert names == [["history0", "riddle0", "sports0", "sports1"], ["history1", "riddle1", "sports2", "sports3"],
                         ["history2", "riddle2", "sports4", "sports5"]]
    assert loader.num_steps(1) == 3 and loader.num_steps(2) == 6


def test_bins_hold_equally_many_tokens_in_the_order_of_the_data() -> None:
    targets = np.array([1, 1, 1, 1, 4, 4, 2, 2])
    assert [part.tolist() for part in bins_of(np.arange(8), targets, 4, "x")] == [[0, 1, 2, 3], [4], [5], [6, 7]]
    assert [part.tolist() for part in bins_of(np.arange(4), np.array([90, 1, 1, 1]), 3, "x")] == [[0], [1], [2, 3]]
    assert [part.tolist() for part in bins_of(np.arange(4), np.array([1, 1, 1, 90]), 3, "x")] == [[0, 1], [2], [3]]
    assert [part.tolist() for part in bins_of(np.array([7, 9]), np.arange(10), 2, "x")] == [[7], [9]]
    with pytest.raises(DataError, match="“x” has 2 examples, which cannot fill 3 buckets"):
        bins_of(np.arange(2), targets, 3, "x")


# Shares ------------------------------------------------------------------------------------------------------------------


def on_course(served: dict[str, float], shares: dict[str, float], longest: dict[str, int]) -> bool:
    """Whether there is a total v of which every category has its share to within half of its longest example."""
    low = max((served[name] - longest[name] / 2) / share for name, share in shares.items() if share)
    high = min((served[name] + longest[name] / 2) / share for name, share in shares.items() if share)
    return low <= high + 1e-9 and all(served[name] == 0 for name, share in shares.items() if not share)


lengths_of_categories = st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 30), min_size=4, max_size=25),
                                        min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_categories, weights=st.lists(st.integers(0, 9), min_size=4, max_size=4), seed=st.integers(0, 99),
       steps=st.one_of(st.none(), st.integers(4, 40)), buckets=st.integers(1, 4), by_tokens=st.booleans())
def test_after_every_step_every_category_is_on_its_course(lengths: dict[str, list[int]], weights: list[int], seed: int,
                                                          steps: int | None, buckets: int, by_tokens: bool) -> None:
    """Realised = asked within one batch: to within half an example of each category, after any number of steps."""
    weights[0] = max(1, weights[0])
    asked = dict(zip(sorted(lengths), weights))
    shares = {name: weight / sum(asked.values()) for name, weight in asked.items()}
    sizes = {"size": None, "tokens": 60} if by_tokens else {"size": 5, "tokens": None}
    with TemporaryDirectory() as folder:
        store = store_of(Path(folder), lengths)
        loader = loader_of(MixConfig(shares=shares, buckets=buckets), store, steps, seed=seed, **sizes)
        count = loader.num_steps(1.7)
        served = dict.fromkeys(lengths, 0.0)
        longest = {name: max(own) for name, own in lengths.items()}
        place = dict.fromkeys(lengths, 0)
        for step in range(count):
            indices = loader.indices(step)
            assert len(indices) == 5 or by_tokens or (steps is None and len(indices) < 5)
            assert not by_tokens or store.lengths[indices].sum() <= 60 or len(indices) == 1
            for name, tokens in learned(store, indices).items():
                served[name] += tokens
            if buckets == 1 or steps is not None:
                assert on_course(served, shares, longest)
            place = {name: place[name] + labels(store, indices).count(name) for name in place}
        # over an epoch stated in epochs, each category has its tokens to within half an example, in buckets too
        if steps is None:
            total = sum(sum(own) for name, own in lengths.items() if shares[name])
            first = learned(store, np.concatenate([loader.indices(step) for step in range(loader.num_steps(1))]))
            assert all(abs(first[name] - shares[name] * total) <= longest[name] / 2 + 1e-6 for name in lengths)


def test_a_batch_is_near_its_shares(store: ExampleStore) -> None:
    loader = loader_of(MixConfig(shares={"zh": 0.5, "en": 0.3, "qa": 0.2}), store, 30, size=None, tokens=700)
    for step in range(30):
        found = learned(store, loader.indices(step))
        total = sum(found.values())
        assert abs(found["zh"] - 0.5 * total) < 12 + 60 / 2 and abs(found["qa"] - 0.2 * total) < 4 + 60 / 5


def test_what_runs_out_comes_again_in_another_order(store: ExampleStore) -> None:
    loader = loader_of(MixConfig(shares={"zh": 0.2, "en": 0.2, "qa": 0.6}), store, 40)
    order = np.concatenate(drawn(loader, 40))
    own = order[[name == "qa" for name in labels(store, order)]]
    passes = [own[start:start + 9].tolist() for start in range(0, len(own) - 8, 9)]
    assert len(passes) > 5 and all(len(set(part)) == 9 for part in passes)
    assert len({tuple(part) for part in passes}) == len(passes), "another order in every pass"


def test_epochs_are_passes(store: ExampleStore) -> None:
    loader = loader_of(MixConfig(epochs={"zh": 2, "en": 0.5, "qa": 3}, buckets=3), store)
    order = np.concatenate(drawn(loader, loader.num_steps(1)))
    counts = np.bincount(order, minlength=len(store))
    for index, name in enumerate(labels(store, range(len(store)))):
        assert counts[index] == {"zh": 2, "qa": 3}.get(name, counts[index]) and counts[index] <= 3
    half = learned(store, order)["en"]
    whole = learned(store, np.arange(len(store)))["en"]
    assert abs(half - whole / 2) <= 30 and max(counts[index] for index in order if store[int(index)].category == "en") == 1


def test_temperature_flattens() -> None:
    sizes = {"zh": 8000.0, "en": 1000.0}
    assert asked_of(MixConfig(temperature=3), sizes)[0] == pytest.approx({"zh": 20 / 30, "en": 10 / 30})
    assert asked_of(MixConfig(temperature=1), sizes)[0] == pytest.approx({"zh": 8 / 9, "en": 1 / 9})
    assert asked_of(MixConfig(temperature=1e9), sizes)[0] == pytest.approx({"zh": 0.5, "en": 0.5})
    assert passes_of(MixConfig(temperature=1), sizes) == {"zh": 1.0, "en": 1.0}
    assert passes_of(MixConfig(temperature=3), sizes) == pytest.approx({"zh": 6000 / 8000, "en": 3.0})
    assert asked_of(MixConfig(epochs={"zh": 0.5, "en": 2}), sizes)[0] == pytest.approx({"zh": 4 / 6, "en": 2 / 6})
    assert passes_of(MixConfig(shares={"zh": 1, "en": 0}), sizes) == {"zh": 1.0, "en": 0.0}


# Buckets and phases ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of_categories, buckets=st.integers(1, 4), seed=st.integers(0, 99))
def test_buckets_lose_nothing_and_keep_their_order(lengths: dict[str, list[int]], buckets: int, seed: int) -> None:
    with TemporaryDirectory() as folder:
        store = store_of(Path(folder), lengths)
        loader = loader_of(MixConfig(buckets=buckets, temperature=1), store, seed=seed)
        for epoch in (0, 1):
            steps = range(loader.num_steps(epoch), loader.num_steps(epoch + 1))
            order = np.concatenate([loader.indices(step) for step in steps])
            assert sorted(order) == list(range(len(store))), "every example once an epoch"
            for name in lengths:
                members = np.array([i for i in range(len(store)) if store[i].category == name])
                bin_of = {int(index): k for k, part in enumerate(bins_of(members, store.targets, buckets, name))
                          for index in part}
                bins = [bin_of[int(index)] for index in order if int(index) in bin_of]
                assert bins == sorted(bins)


def test_a_run_in_steps_goes_through_the_buckets_once_in_each_phase(store: ExampleStore) -> None:
    config = MixConfig(buckets=2, phases=[{"name": "base", "ratio": 0.25, "shares": {"en": 1}},
                                          {"steps": 10, "shares": {"en": 0.5, "zh": 0.5}},
                                          {"shares": {"en": 0.3, "zh": 0.2, "qa": 0.5}}])
    loader = loader_of(config, store, 40)
    assert isinstance(loader, MixedRun)
    assert loader.borders == [(0, 5, 0, 0), (5, 10, 0, 1), (10, 15, 1, 0), (15, 20, 1, 1), (20, 30, 2, 0), (30, 40, 2, 1)]
    bins = {int(index): k for row in loader.streams.bins for k, part in enumerate(row) for index in part}
    for start, end, phase, bucket in loader.borders:
        indices = np.concatenate([loader.indices(step) for step in range(start, end)])
        assert len(indices) == 7 * (end - start)
        assert {bins[int(index)] for index in indices} == {bucket}
        assert set(labels(store, indices)) == [{"en"}, {"en", "zh"}, {"en", "zh", "qa"}][phase]
    # of two phases the second begins with what the first has not seen
    zh = [index for start, end in ((10, 15), (20, 30)) for step in range(start, end) for index in loader.indices(step)
          if store[int(index)].category == "zh"]
    bin_size = len(loader.streams.bins[2][0])
    assert loader.groups.names[2] == "zh" and bin_size < len(zh)
    assert len(set(zh[:bin_size])) == bin_size


@pytest.mark.parametrize(("config", "steps", "message"), [
    ({"buckets": 5}, 4, "the run has 4 of 4 steps and needs at least 5, one for each bucket"),
    ({"phases": [{"ratio": 0.5, "shares": {"a": 1}}, {"ratio": 0.4, "shares": {"a": 1}}]}, 10, "take 9 of the 10 steps"),
    ({"phases": [{"steps": 12, "shares": {"a": 1}}, {"shares": {"a": 1}}]}, 10, "phase 2 has 0 of 10 steps"),
    ({"phases": [{"shares": {"a": 1}}]}, None, "mix.phases are parts of max_steps: set it"),
    ({"epochs": {"a": 1}}, 10, "mix.epochs say how long to train, and so does max_steps"),
])
def test_lengths_that_do_not_fit(config: dict, steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixConfig(**config).check_length(steps, False)


def test_passes_and_num_train_epochs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="so does num_train_epochs"):
        MixConfig(epochs={"a": 1}).check_length(None, True)


def test_a_source_with_brackets_in_its_name_is_meant_by_it(tmp_path: Path) -> None:
    examples = [Example([1], [Branch(np.full(3, 3))], name, "c", f"{name}{number}")
                for number in range(4) for name in ("zh[1].txt", "en.txt")]
    write_examples(tmp_path, examples, VOCAB)
    config = MixConfig(by="source", shares={"zh[1].txt": 0.5, "e*": 0.5})
    account = share_account(loader_of(config, ExampleStore(tmp_path), steps=2, size=4), config, 2)
    assert {row["name"]: row["tokens"] for row in account["groups"]} == {"zh[1].txt": 12, "e*": 12}


@pytest.mark.parametrize(("values", "message"), [
    ({}, "a mix needs shares, epochs, a temperature, phases or buckets"),
    ({"shares": {"a": 0.7, "b": 0.2}}, "these sum to 0.9"),
    ({"shares": {"a": 1.1, "b": -0.1}}, "greater than or equal to 0"),
    ({"shares": {"a": 1}, "epochs": {"a": 1}}, "shares and epochs cannot both be set"),
    ({"epochs": {"a": 0}}, "leave nothing to train on"),
    ({"epochs": {"a": float("inf")}}, "finite number"), ({"shares": {"a": float("nan")}}, "finite number"),
    ({"temperature": 0.7}, "an exponent of 0.7 is a temperature of 1.43"),
    ({"phases": [{"shares": {"a": 1}}, {"shares": {"a": 1}}]}, "only the last phase may leave out"),
    ({"phases": [{"shares": {"a": 1}, "steps": 1, "ratio": 0.1}]}, "steps and ratio cannot both"),
    ({"phases": [{"steps": 1}]}, "shares or a temperature"),
])
def test_a_mix_that_cannot_be_meant(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixConfig(**values)


@pytest.mark.parametrize(("config", "message"), [
    ({"shares": {"zh": 0.5, "en": 0.5}}, "the category “qa”, which the mix does not name"),
    ({"shares": {"zh": 0.5, "en": 0.3, "qa": 0.1, "qua": 0.1}}, "no example is of the category “qua”"),
    ({"by": "source", "shares": {"zh/*": 0.5, "*": 0.5}}, "fits both “zh/\\*” and “\\*”"),
    ({"by": "source", "shares": {"[ze]*": 0.5, "q*": 0.4, "x*": 0.1}}, "no source fits “x\\*”"),
    ({"by": "source", "shares": {"zh/*": 1}}, "the source “en/0.txt”, which the mix does not name"),
    ({"buckets": 10}, "“qa” has 9 examples, which cannot fill 10 buckets"),
    ({"epochs": {"zh": 0.001, "en": 0, "qa": 0}}, "holds not one example"),
])
def test_data_that_do_not_hold_what_is_asked(store: ExampleStore, config: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader_of(MixConfig(**config), store).num_steps(1)


def test_a_bucket_of_nothing_is_refused_and_not_drawn_for_ever(tmp_path: Path) -> None:
    rows = [Example([], [Branch([3] * length)], "a.txt", "zh", str(length)) for length in (1, 6, 6, 6)]
    for corrupted, folder in ((False, tmp_path / "plain"), (True, tmp_path / "corrupted")):
        folder.mkdir()
        write_examples(folder, rows, VOCAB, corrupted=corrupted)
    with pytest.raises(DataError, match="“zh” has a bucket in which nothing is learned"):
        loader_of(MixConfig(buckets=4), ExampleStore(tmp_path / "plain"), 4, size=1)
    store = ExampleStore(tmp_path / "corrupted")  # of masked text the first token may have to be mended, too
    assert store.targets.tolist() == [1, 6, 6, 6] and store.num_targets == 19
    assert len(loader_of(MixConfig(buckets=4), store, 4, size=1).indices(0)) == 1


def test_what_is_left_out_need_not_fill_the_buckets(store: ExampleStore) -> None:
    config = MixConfig(shares={"zh": 0.5, "en": 0.5, "qa": 0}, buckets=12)
    for steps in (None, 40):
        loader = loader_of(config, store, steps)
        order = np.concatenate(drawn(loader, loader.num_steps(1)))
        assert set(labels(store, order)) == {"zh", "en"}
        assert loader.batch(3).standing["share/qa"] == 0


# Determinism -------------------------------------------------------------------------------------------------------------


MIXES = [(MixConfig(shares={"zh": 0.5, "en": 0.3, "qa": 0.2}, buckets=3), 40),
         (MixConfig(shares={"zh": 0.5, "en": 0.3, "qa": 0.2}, buckets=3), None),
         (MixConfig(phases=[{"ratio": 0.4, "temperature": 2}, {"shares": {"zh": 1}}]), 40)]


@pytest.mark.parametrize(("config", "steps"), MIXES)
def test_any_step_can_be_read_first(store: ExampleStore, config: MixConfig, steps: int | None) -> None:
    loader = loader_of(config, store, steps)
    count = loader.num_steps(3)
    whole = drawn(loader, count)
    for step in (count - 1, 17, 0, 5):
        fresh = loader_of(config, store, steps)
        data = fresh.batch(step)
        assert np.array_equal(data.indices, whole[step])
        assert [example.id for example in data.examples] == [store.id(int(index)) for index in whole[step]]
        so_far = learned(store, np.concatenate(whole[:step + 1]))
        for name, tokens in so_far.items():
            assert data.standing[f"share/{name}"] == pytest.approx(tokens / sum(so_far.values()))
            size = learned(store, np.arange(len(store)))[name]
            assert data.standing[f"epochs/{name}"] == pytest.approx(tokens / size)
    other = drawn(loader_of(config, store, steps, seed=6), 5)
    assert any(not np.array_equal(left, right) for left, right in zip(whole, other))


@pytest.mark.parametrize("sizes", [{"size": 7}, {"size": None, "tokens": 60}])
def test_how_far_is_merged_at_once_changes_nothing(store: ExampleStore, monkeypatch: pytest.MonkeyPatch,
                                                   sizes: dict) -> None:
    config, steps = MIXES[0]
    expected = drawn(loader_of(config, store, steps, **sizes), 40)
    for more in (0.01, *np.linspace(0.8, 1.1, 25), 7.0):
        monkeypatch.setattr("danlu.data.mixed.MORE", more)
        found = drawn(loader_of(config, store, steps, **sizes), 40)
        assert all(np.array_equal(left, right) for left, right in zip(expected, found, strict=True))


def test_another_category_does_not_reorder_the_others(tmp_path: Path) -> None:
    orders = []
    for more in ({}, {"b": [3] * 5}):
        store = store_of(tmp_path / str(len(more)), {"a": [2] * 9, "c": [4] * 9, **more})
        loader = loader_of(MixConfig(temperature=2), store)
        order = np.concatenate(drawn(loader, loader.num_steps(1)))
        orders.append([store[int(index)].id for index in order if store[int(index)].category == "c"])
    assert orders[0][:6] == orders[1][:6]


# The account -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "steps"), [*MIXES, (None, None), (MixConfig(buckets=2, by="source"), None)])
def test_the_account_is_what_the_steps_take(store: ExampleStore, config: MixConfig | None, steps: int | None) -> None:
    loader = Loader(store, seed=5, global_batch_size=7) if config is None else loader_of(config, store, steps)
    count = loader.num_steps(2)
    account = share_account(loader, config, count)
    order = np.concatenate(drawn(loader, count))
    total = int(store.targets[order].sum())
    assert account["tokens"] == total == sum(phase["tokens"] for phase in account["phases"])
    assert sum(phase["steps"] for phase in account["phases"]) == account["steps"] == count
    assert sum(row["realised"] for row in account["groups"]) == pytest.approx(1)
    assert sum(row["asked"] for row in account["groups"]) == pytest.approx(1)
    by_source = config is not None and config.by == "source"
    for row in account["groups"]:
        def mine(index: int, row: dict = row) -> bool:
            return (store[index].source if by_source else store[index].category) == row["name"]

        members = [index for index in range(len(store)) if mine(index)]
        seen = [int(index) for index in order if mine(int(index))]
        assert row["tokens"] == store.targets[seen].sum() == sum(part["tokens"] for part in row["sources"])
        assert (row["examples"], row["examples_seen"]) == (len(members), len(set(seen)))
        assert row["epochs"] == pytest.approx(row["tokens"] / store.targets[members].sum())
        assert row["unseen_tokens"] == store.targets[[index for index in members if index not in set(seen)]].sum()
        assert len(row["sources"]) == (1 if by_source else 3)


def test_the_account_tells_phases_apart(store: ExampleStore) -> None:
    config = MixConfig(phases=[{"name": "one", "steps": 10, "shares": {"zh": 1}},
                               {"shares": {"zh": 0.2, "en": 0.6, "qa": 0.2}}])
    account = share_account(loader_of(config, store, 40), config, 40)
    one, two = account["phases"]
    assert (one["name"], one["first_step"], one["steps"]) == ("one", 0, 10)
    assert (two["name"], two["first_step"], two["steps"]) == ("2", 10, 30)
    assert one["shares"]["zh"] == {"asked": 1.0, "realised": 1.0, "tokens": one["tokens"]}
    assert two["shares"]["en"]["realised"] == pytest.approx(0.6, abs=0.02)
    [row] = [row for row in account["groups"] if row["name"] == "en"]
    assert row["asked"] == pytest.approx(0.6 * two["tokens"] / account["tokens"])
    stopped = share_account(loader_of(config, store, 40), config, 8)
    assert [phase["steps"] for phase in stopped["phases"]] == [8]


def test_what_comes_too_often_is_said_or_refused(store: ExampleStore) -> None:
    config = MixConfig(shares={"zh": 0.3, "en": 0.3, "qa": 0.4})
    account = share_account(loader_of(config, store, 40), config, 40)
    epochs = {row["name"]: row["epochs"] for row in account["groups"]}
    assert epochs["qa"] > 4 > epochs["en"]
    [sentence] = [text for text in require_epochs(account, None) if "“qa”" in text]
    assert f"is seen {epochs['qa']:.1f} times" in sentence
    assert require_epochs(account, epochs["qa"]) == []
    with pytest.raises(DataError, match=r"“qa” would be seen .* times; mix.max_epochs is 3"):
        require_epochs(account, 3)


def test_the_store_knows_what_each_example_learns(store: ExampleStore) -> None:
    assert store.targets.tolist() == [example.num_targets for example in store]
    assert [store.labels("source")[number] for number in store.label_indices("source")] == [item.source for item in store]
    assert all(left <= right for left, right in pairwise(sorted(store.labels("category"))))
