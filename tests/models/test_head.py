"""The head against the plain formula in float64, gradients included."""

from typing import Any

import pytest
import torch

from danlu.models import head

SHAPES = [head.Shape(), head.Shape(scale=0.25), head.Shape(softcap=3.0), head.Shape(scale=0.5, softcap=2.0)]


def reference(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, shape: head.Shape
              ) -> torch.Tensor:
    z = h @ w.t() + (0 if b is None else b)
    z = z * shape.scale
    if shape.softcap is not None:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    return z.log_softmax(1).gather(1, y[:, None])[:, 0]


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> tuple:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 16 * 41)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(41, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    b = torch.randn(41, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randint(0, 41, (50,), generator=generator)
    c = torch.randn(50, dtype=torch.float64, generator=generator)
    return h, w, b, y, c


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_weighted_sum(problem: tuple, shape: head.Shape, bias: bool) -> None:
    h, w, b, y, c = problem
    inputs = [h, w, b] if bias else [h, w]
    expected = (reference(h, w, b if bias else None, y, shape) * c).sum()
    gradients = torch.autograd.grad(expected * 3, inputs)
    total, logp = head.weighted_sum(h, w, y, c, workspace=head.Workspace(), bias_V=b if bias else None, shape=shape)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(logp, reference(h, w, b if bias else None, y, shape), rtol=1e-12, atol=1e-12)
    for own, other in zip(torch.autograd.grad(total * 3, inputs), gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_are_differentiable(problem: tuple, shape: head.Shape) -> None:
    h, w, b, y, c = problem
    expected = torch.sigmoid(reference(h, w, b, y, shape) * c).sum()
    own = torch.sigmoid(head.logprobs(h, w, y, workspace=head.Workspace(), bias_V=b, shape=shape).logprobs_S * c).sum()
    assert own.item() == pytest.approx(expected.item(), rel=1e-12)
    for left, right in zip(torch.autograd.grad(own, [h, w, b]), torch.autograd.grad(expected, [h, w, b]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_statistics(problem: tuple) -> None:
    h, w, b, y, _ = problem
    found = head.logprobs(h, w, y, workspace=head.Workspace(), bias_V=b, statistics=True)
    distribution = torch.distributions.Categorical(logits=h @ w.t() + b)
    torch.testing.assert_close(found.entropy_S, distribution.entropy())
    assert torch.equal(found.argmax_S, distribution.logits.argmax(1))


def test_a_frozen_head_gets_no_gradient_and_the_states_do(problem: tuple) -> None:
    h, w, _, y, c = problem
    total, _ = head.weighted_sum(h, w.detach(), y, c, workspace=head.Workspace())
    total.backward()
    assert h.grad is not None and w.grad is None


def test_extreme_logits_stay_finite() -> None:
    h = torch.tensor([[200.0, -200.0]], requires_grad=True)
    w = torch.eye(2)
    total, logp = head.weighted_sum(h, w, torch.tensor([1]), torch.ones(1), workspace=head.Workspace())
    total.backward()
    assert logp.item() == -400 and torch.isfinite(h.grad).all()


def test_where_gradients_are_off_none_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the gradients of a weighted sum nor the probabilities for a later backward pass."""
    h, w = torch.randn(40, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    y, room = torch.randint(0, 50, (40,)), head.Workspace()
    asked = []
    monkeypatch.setattr(head._Pass, "can_keep", lambda self, h_SD: asked.append(self) or True)
    made = []
    run = head._Pass.run

    def watched(self: head._Pass, *args: Any, **options: Any) -> Any:
        made.append(args[2])
        return run(self, *args, **options)

    monkeypatch.setattr(head._Pass, "run", watched)
    with torch.no_grad():
        quiet = head.logprobs(h, w, y, workspace=room).logprobs_S
        total, _ = head.weighted_sum(h, w, y, torch.ones(40), workspace=room)
    assert not asked and made == [None, None]
    assert float(total) == pytest.approx(float(quiet.sum()), rel=1e-5)
    kept = head.logprobs(h, w, y, workspace=room).logprobs_S
    assert len(asked) == 1 and torch.allclose(kept, quiet)


def test_kept_probabilities_give_the_gradients_of_computed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the workspace was used by somebody else before the backward pass."""
    found = []
    for keeps, disturbed in ((1 << 28, False), (0, False), (1 << 28, True)):
        monkeypatch.setattr(head, "KEPT_ELEMENTS", keeps)
        torch.manual_seed(0)
        h, w = torch.randn(700, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
        y, room = torch.randint(0, 50, (700,)), head.Workspace()
        logprobs = head.logprobs(h, w, y, workspace=room).logprobs_S
        if disturbed:
            head.logprobs(h.detach() + 1, w.detach(), y, workspace=room)
        (logprobs * torch.linspace(-1, 1, 700)).sum().backward()
        found.append((h.grad, w.grad))
    for own in found[1:]:
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found[0], own, strict=True))


def test_a_very_small_probability_keeps_its_digits() -> None:
    h, w = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [-90.0], [-200.0]])
    y, room = torch.tensor([1, 2]), head.Workspace()
    found = head.logprobs(h, w, y, workspace=room).logprobs_S
    expected = (h.double() @ w.double().t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
    assert found.double() == pytest.approx(expected, rel=1e-6)


def test_sums_over_a_large_vocabulary_do_not_lose_small_terms() -> None:
    """Those of torch's own softmax on the CPU do where a few logits are large: log p comes out some 4e-6 too high."""
    generator = torch.Generator().manual_seed(0)
    h_SD, y_S = torch.randn(64, 32, generator=generator), torch.randint(0, 49152, (64,), generator=generator)
    weight_VD = torch.randn(49152, 32, generator=generator) * 0.7
    exact_S = (h_SD.double() @ weight_VD.double().t()).log_softmax(1).gather(1, y_S[:, None])[:, 0]
    found_S = head.logprobs(h_SD, weight_VD, y_S, workspace=head.Workspace()).logprobs_S
    assert abs(float((found_S.double() - exact_S).mean())) < 5e-7
