"""danlu's DPO beside TRL's own DPOTrainer: the same loss and the same gradient on the same ragged pairs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl_sides import BETA, ExactHead, differences, make_theirs, ours, pair_examples, policy_and_reference, quiet_trl, texts

from danlu.objectives.pair_losses import Terms
from danlu.objectives.preference import DPO

EVERY = slice(None)


@pytest.fixture(scope="module")
def trl() -> Iterator[Any]:
    with quiet_trl() as found:
        yield found


def test_loss_and_gradient_equal_trls(trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", ExactHead)
    models = policy_and_reference()
    theirs = make_theirs(trl.dpo, tmp_path, *models, texts(6), loss_type=["sigmoid"])
    examples = pair_examples(theirs.rows(EVERY))
    assert len({example.num_tokens for example in examples}) > 3, "ragged rows"
    left, right = ours(DPO(Terms(BETA)), *models, examples), theirs.side(EVERY)
    assert abs(right.loss - np.log(2)) > 0.01 and 0 < right.metrics["rewards/accuracies"] < 1, "the two have drifted apart"
    loss, gradient = differences(left, right)
    assert loss < 1e-9 and gradient < 1e-9, (loss, gradient)
    assert left.metrics == pytest.approx(right.metrics, rel=1e-6)  # some of theirs are float32
    rounded = ours(DPO(Terms(BETA)), *models, examples, stored=True)
    assert max(differences(rounded, right)) < 1e-6


def test_with_trls_own_head_they_agree_to_float32(trl: Any, tmp_path: Path) -> None:
    models = policy_and_reference()
    theirs = make_theirs(trl.dpo, tmp_path, *models, texts(6), loss_type=["sigmoid"])
    found = differences(ours(DPO(Terms(BETA)), *models, pair_examples(theirs.rows(EVERY))), theirs.side(EVERY))
    assert max(found) < 2e-6, found


def test_the_additive_form_equals_trls_sum_of_losses(trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL adds α times the `sft` loss, a mean over all chosen tokens of a batch; on one pair that is the answer's mean."""
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", ExactHead)
    models = policy_and_reference()
    theirs = make_theirs(trl.dpo, tmp_path, *models, texts(6), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    for place in range(3):
        own = slice(place, place + 1)
        right, examples = theirs.side(own), pair_examples(theirs.rows(own))
        for objective in (DPO(Terms(BETA), rpo_alpha=0.7), DPO(Terms(BETA), {"sigmoid": 1.0, "sft": 0.7})):
            found = differences(ours(objective, *models, examples), right)
            assert max(found) < 1e-9, found


def test_equal_weights_begin_at_the_logarithm_of_two(trl: Any, tmp_path: Path) -> None:
    _, reference = policy_and_reference()
    theirs = make_theirs(trl.dpo, tmp_path, reference, reference, texts(6), loss_type=["sigmoid"])
    left = ours(DPO(Terms(BETA)), reference, reference, pair_examples(theirs.rows(EVERY)))
    assert left.loss == pytest.approx(np.log(2), abs=1e-12) and theirs.side(EVERY).loss == pytest.approx(np.log(2))
    assert left.metrics["rewards/margins"] == 0 and left.metrics["rewards/accuracies"] == 0.5


def test_the_comparison_can_fail(trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another β, and answers that end one token early, are seen at once."""
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", ExactHead)
    models = policy_and_reference()
    theirs = make_theirs(trl.dpo, tmp_path, *models, texts(6), loss_type=["sigmoid"])
    right, rows = theirs.side(EVERY), theirs.rows(EVERY)
    assert min(differences(ours(DPO(Terms(BETA * 1.001)), *models, pair_examples(rows)), right)) > 1e-6
    cut = [{name: ids[:-1] if name == "chosen_ids" else ids for name, ids in row.items()} for row in rows]
    assert min(differences(ours(DPO(Terms(BETA)), *models, pair_examples(cut)), right)) > 1e-4
