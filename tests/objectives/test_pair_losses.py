"""Each loss of pairs against its formula in plain numbers, worked examples, and the ends of the number line."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.objectives.pair_losses import LOSSES, Pairs, PrefLoss, Terms, unread
from danlu.objectives.unpaired import LOSSES as UNPAIRED

ONE = Terms(pref_beta=0.5, dpo_label_smoothing=0.1, simpo_gamma=0.7, cpo_alpha=0.6, discopop_tau=0.4)


def some_pairs(seed: int, count: int = 5, scale: float = 3.0) -> Pairs:
    rng = np.random.default_rng(seed)
    logp = [torch.from_numpy(-rng.gamma(3.0, scale, count)) for _ in range(4)]
    tokens = [torch.from_numpy(rng.integers(1, 12, count).astype(float)) for _ in range(2)]
    return Pairs(*logp, *tokens, likelihood=logp[0] + 0.25)


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x)) if x < 30 else x + math.exp(-x)


def nls(x: float) -> float:
    """−log σ(x)."""
    return log1pexp(-x)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smooth(x: float, e: float) -> float:
    return (1 - e) * nls(x) + e * nls(-x)


def score(x: float, terms: Terms) -> float:
    """f′(u) once more, in u."""
    u = math.exp(x)
    a = terms.f_alpha_divergence_coef
    return {"reverse_kl": math.log(u), "forward_kl": 1 - 1 / u, "js_divergence": math.log(2 * u / (1 + u)),
            "alpha_divergence": (1 - u ** -a) / a}[terms.f_divergence_type]


def by_hand(name: str, p: Pairs, terms: Terms) -> list[float]:
    """Every loss, pair by pair, from its equation."""
    c, r, rc, rr, nc, nr, whole = (list(map(float, getattr(p, field))) for field in (
        "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens", "likelihood"))
    b, e = terms.pref_beta, terms.dpo_label_smoothing
    n = len(c)
    lc, lr = [x - y for x, y in zip(c, rc)], [x - y for x, y in zip(r, rr)]
    d = [score(x, terms) - score(y, terms) for x, y in zip(lc, lr)]
    dm = [score(x, terms) / m - score(y, terms) / k for x, y, m, k in zip(lc, lr, nc, nr)]
    nll = [-x / m for x, m in zip(whole, nc)]

    def ranked(above: list[float], below: list[float]) -> list[float]:
        """The k-th smallest of the one against the k-th smallest of the other, told at its pair."""
        return [smooth(b * (x - sorted(below)[sorted(above).index(x)]), e) for x in above]

    shift = b * (sum(lc) / n + sum(lr) / n) / 2
    odds = [(x / m - math.log(1 - math.exp(x / m))) - (y / k - math.log(1 - math.exp(y / k)))
            for x, y, m, k in zip(c, r, nc, nr)]
    found: dict[str, Callable[[int], float]] = {
        "sigmoid": lambda i: smooth(b * d[i], e),
        "hinge": lambda i: max(0.0, 1 - b * d[i]),
        "ipo": lambda i: (dm[i] - 1 / (2 * b)) ** 2,
        "exo_pair": lambda i: sum(q * math.log(q / t) for q, t in ((sigma(b * d[i]), 1 - e), (sigma(-b * d[i]), e))),
        "nca_pair": lambda i: nls(b * lc[i]) + nls(-b * lc[i]) / 2 + nls(-b * lr[i]) / 2,
        "robust": lambda i: ((1 - e) * nls(b * d[i]) - e * nls(-b * d[i])) / (1 - 2 * e),
        "bco_pair": lambda i: nls(b * lc[i]) + nls(-b * lr[i]),
        "bco": lambda i: nls(b * lc[i] - shift) + nls(shift - b * lr[i]),
        "sppo_hard": lambda i: (lc[i] - 1 / (2 * b)) ** 2 + (lr[i] + 1 / (2 * b)) ** 2,
        "aot": lambda i: ranked([x - y for x, y in zip(c, r)], [x - y for x, y in zip(rc, rr)])[i],
        "aot_unpaired": lambda i: ranked(lc, lr)[i],
        "apo_zero": lambda i: 1 - sigma(b * lc[i]) + sigma(b * lr[i]),
        "apo_down": lambda i: sigma(b * lc[i]) + 1 - sigma(b * (lc[i] - lr[i])),
        "discopop": lambda i: (1 - sigma(b * d[i] / terms.discopop_tau)) * nls(b * d[i])
        + sigma(b * d[i] / terms.discopop_tau) * math.exp(-b * d[i]),
        "sigmoid_norm": lambda i: nls(b * dm[i]),
        "sft": lambda i: nll[i],
        "simpo": lambda i: smooth(b * (c[i] / nc[i] - r[i] / nr[i]) - terms.simpo_gamma, e),
        "orpo": lambda i: nll[i] + b * nls(odds[i]),
        "cpo": lambda i: smooth(b * (c[i] - r[i]), e) + terms.cpo_alpha * nll[i],
    }
    return [found[name](i) for i in range(n)]


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 2 ** 32 - 1), beta=st.floats(0.05, 3.0), epsilon=st.floats(0.001, 0.49))
@settings(deadline=None, max_examples=25)
def test_equals_its_formula(name: str, seed: int, beta: float, epsilon: float) -> None:
    terms = replace(ONE, pref_beta=beta, dpo_label_smoothing=epsilon)
    pairs = some_pairs(seed)
    assert LOSSES[name].function(pairs, terms).tolist() == pytest.approx(by_hand(name, pairs, terms), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"])
def test_divergences_equal_their_formula(name: str, kind: Any) -> None:
    for alpha in (0.2, 0.5, 0.9):
        terms = replace(ONE, f_divergence_type=kind, f_alpha_divergence_coef=alpha)
        pairs = some_pairs(3, scale=1.0)
        assert LOSSES[name].function(pairs, terms).tolist() == pytest.approx(by_hand(name, pairs, terms), rel=1e-9)


def test_an_alpha_divergence_goes_from_one_kullback_leibler_to_the_other() -> None:
    pairs = some_pairs(1, scale=1.0)

    def at(**more: Any) -> list[float]:
        return LOSSES["sigmoid"].function(pairs, Terms(**more)).tolist()

    assert at(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1e-7) == pytest.approx(at(), rel=1e-5)
    assert at(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0) == \
        pytest.approx(at(f_divergence_type="forward_kl"), rel=1e-12)


WORKED = {  # chosen −4 (2 tokens, reference −5), rejected −9 (3 tokens, reference −8); β = 0.5
    "sigmoid": math.log(1 + math.exp(-1)), "hinge": 0.0, "ipo": (0.5 + 1 / 3 - 1) ** 2,
    "bco_pair": 2 * math.log(1 + math.exp(-0.5)),
    "bco": 2 * math.log(1 + math.exp(-0.5)), "sppo_hard": 0.0, "apo_zero": 2 / (1 + math.exp(0.5)), "sft": 2.0,
    "sigmoid_norm": math.log(1 + math.exp(-0.5 * 5 / 6)), "simpo": math.log(1 + math.exp(-(0.5 * 1 - 0.5))),
    "aot": math.log(1 + math.exp(-1)), "cpo": math.log(1 + math.exp(-2.5)) + 2.0,
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_numbers(name: str) -> None:
    def row(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    pairs = Pairs(row(-4), row(-9), row(-5), row(-8), row(2), row(3), row(-4))
    assert LOSSES[name].function(pairs, Terms(pref_beta=0.5)).item() == pytest.approx(WORKED[name], abs=1e-12)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", LOSSES)
def test_far_away_everything_stays_finite(name: str, kind: Any) -> None:
    """Log-ratios of thousands of nats, either way and both at once, and answers that are certain."""
    ends = [(0.0, -5e3), (-5e3, 0.0), (-5e3, -5e3), (0.0, 0.0), (-1e-14, -1e-14), (-800.0, -2.0), (-2.0, -800.0)]
    table = torch.tensor([(a, b, c, d) for a, b in ends for c, d in ends], dtype=torch.float64).requires_grad_()
    tokens = torch.ones(len(table), dtype=torch.float64)
    pairs = Pairs(*table.unbind(1), tokens, 3 * tokens, table[:, 0])
    terms = replace(ONE, f_divergence_type=kind) if "f_divergence_type" in LOSSES[name].reads else ONE
    loss = LOSSES[name].function(pairs, terms)
    [slope] = torch.autograd.grad(loss.sum(), table)
    finite = loss.isfinite()
    if name == "discopop":  # e^−x is a part of it
        finite = finite | (loss.detach() > 1e300)
    assert finite.all() and slope[loss.isfinite()].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_what_it_says_and_nothing_else(name: str) -> None:
    pairs = some_pairs(2, scale=1.0)
    moved = {"pref_beta": 0.9, "dpo_label_smoothing": 0.2, "f_divergence_type": "js_divergence", "simpo_gamma": 1.5,
             "cpo_alpha": 0.1, "discopop_tau": 0.9}
    before = LOSSES[name].function(pairs, ONE)
    for setting, value in moved.items():
        after = LOSSES[name].function(pairs, replace(ONE, **{setting: value}))
        assert torch.allclose(before, after) == (setting not in LOSSES[name].reads), setting
    asked = replace(pairs, ref_chosen=pairs.ref_chosen - 1, ref_rejected=pairs.ref_rejected * 2)
    assert torch.allclose(before, LOSSES[name].function(asked, ONE)) != LOSSES[name].reference


@pytest.mark.parametrize("name", LOSSES)
def test_only_coupled_losses_look_at_other_pairs(name: str) -> None:
    pairs = some_pairs(4, count=6)
    fields = [getattr(pairs, field).split(1) for field in Pairs.__dataclass_fields__]
    alone = torch.cat([LOSSES[name].function(Pairs(*row), ONE) for row in zip(*fields)])
    assert torch.allclose(alone, LOSSES[name].function(pairs, ONE)) != LOSSES[name].coupled


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.coupled])
def test_the_order_of_the_pairs_does_not_matter(name: str) -> None:
    pairs, order = some_pairs(5, count=7), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    turned = Pairs(*(getattr(pairs, field)[order] for field in Pairs.__dataclass_fields__))
    torch.testing.assert_close(LOSSES[name].function(turned, ONE), LOSSES[name].function(pairs, ONE)[order])


def test_the_names_are_those_of_the_recipes() -> None:
    assert set(get_args(PrefLoss)) == set(LOSSES)


def test_what_several_losses_have_to_read() -> None:
    assert unread(["sigmoid", "hinge"], "dpo_label_smoothing") == []
    assert unread(["hinge", "ipo"], "dpo_label_smoothing") == ["hinge", "ipo"]
    assert unread(["sigmoid", "nca_pair"], "f_divergence_type") == ["nca_pair"]
    assert unread(["sigmoid", "sft"], "ld_alpha") == [] and unread(["sft"], "ld_alpha") == ["sft"]
    assert unread(["sigmoid", "sft"], "use_weighting") == ["sft"]
    assert unread(["sigmoid"], "learning_rate") == []


@pytest.mark.parametrize("page", ["objectives.md", "objectives.zh.md"])
def test_the_page_names_every_loss_and_who_reads_what(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    names = {row[0].removeprefix("| ").strip("`") for row in rows}
    assert set(LOSSES) <= names and set(UNPAIRED) <= names
    for setting in ("dpo_label_smoothing", "f_divergence_type"):
        [told] = [re.findall(r"`(\w+)`", row[-1]) for row in rows if row[0] == f"| `{setting}`"]
        assert set(told) == {name for name, loss in LOSSES.items() if setting in loss.reads}
