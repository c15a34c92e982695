from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import TrainingError
from peftcore.train import linear_cross_entropy

N, D, V = 11, 6, 17


def given(dtype: torch.dtype = torch.float64, n: int = N, bias: bool = False) -> tuple[Tensor, Tensor, Tensor, Any]:
    """hidden (n, d), weight (V, d), targets (n,), bias (V,) or None."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (2 * torch.randn(k, D, generator=generator, dtype=torch.float64).to(dtype) for k in (n, V))
    targets = torch.randint(V, (n,), generator=generator)
    return hidden, weight, targets, torch.randn(V, generator=generator).to(dtype) if bias else None


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 100])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.25), (2.0, 1.7)])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_the_logits(
    trained_head: bool, chunk: int | None, softcap: float | None, scale: float, bias: bool
) -> None:
    hidden, weight, targets, offset = given(bias=bias)
    inputs = [hidden, weight, *([offset] if bias else [])] if trained_head else [hidden]
    for tensor in inputs:
        tensor.requires_grad_()
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    expected = plain(hidden, weight, targets, offset, softcap, scale)
    found = linear_cross_entropy(hidden, weight, targets, offset, softcap, scale, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained_head", [False, True])
def test_gradcheck(trained_head: bool) -> None:
    hidden, weight, targets, bias = given(n=3, bias=True)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    bias.requires_grad_(trained_head)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, 4.0, 1.3, chunk=2), (hidden, weight, bias)
    )


def test_only_a_part_of_a_head_may_be_trained() -> None:
    hidden, weight, targets, bias = given(bias=True)
    bias.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, bias)
    (found,) = torch.autograd.grad(loss.sum(), bias)
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets, bias, None, 1.0).sum(), bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n: int, trained_head: bool) -> None:
    hidden, weight, targets, _ = given(n=n)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    losses = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(losses, plain(hidden, weight, targets, None, None, 1.0), rtol=1e-10, atol=1e-10)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (n, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("trained_head", [False, True])
def test_low_precision_is_right_within_its_rounding(dtype: torch.dtype, trained_head: bool) -> None:
    hidden, weight, targets, _ = given(dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    losses = linear_cross_entropy(hidden, weight, targets)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    logits = (hidden @ weight.T).double()  # rounded as the head rounds them
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=3e-6, atol=3e-6)
    wide, head = (x.detach().double().requires_grad_() for x in (hidden, weight))
    F.cross_entropy(wide @ head.T + (logits - wide @ head.T).detach(), targets).backward()
    for mine, theirs in ((hidden, wide), (weight, head))[: 1 + trained_head]:
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == dtype
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_tokens_that_are_nearly_sure_keep_their_gradient() -> None:
    # p is 0.9975, which bfloat16 takes for 0.996 or 1, so p - 1 has to be formed before it is rounded
    hidden = torch.tensor([[6.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(-torch.sigmoid(torch.tensor(-6.0)).item(), rel=0.004)


def test_improbable_tokens_have_their_loss() -> None:
    # exp(-400) is no float32, so the loss cannot come from the probability
    hidden = torch.tensor([[400.0], [-1.0], [80.0]])
    losses = linear_cross_entropy(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([1, 1, 1]))
    expected = F.softplus(hidden.double().squeeze(1))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_sure_token_has_no_negative_loss() -> None:
    hidden = torch.linspace(10, 90, 50).unsqueeze(1)
    losses = linear_cross_entropy(hidden, torch.linspace(1, -1, 40).unsqueeze(1), torch.zeros(50, dtype=torch.int64))
    assert losses.min() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_what_it_does_to_a_linear_layer(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = given(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, targets)
        logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.to(losses.dtype), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=3e-6, atol=3e-6)
    mine = torch.autograd.grad(losses.sum(), (hidden, weight))
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() / other.norm() < 2 * torch.finfo(logits.dtype).eps


# -- memory ----------------------------------------------------------------------------------------------------


def saved_elements(*, trained_head: bool) -> list[int]:
    hidden, weight, targets, _ = given()
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (hidden.data_ptr(), weight.data_ptr()):
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, targets)
    return sizes


def test_a_frozen_head_keeps_one_gradient_of_the_hidden_states_alone() -> None:
    assert saved_elements(trained_head=False) == [N * D]


def test_a_trained_head_keeps_nothing_of_its_own() -> None:
    assert saved_elements(trained_head=True) == []


def test_nothing_is_done_for_a_gradient_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = given()
    products: list[Any] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(args) or real(*args, **kwargs))
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden.requires_grad_(), weight, targets).requires_grad
    assert len(products) == 2
    assert linear_cross_entropy(hidden, weight, targets).requires_grad
    assert len(products) == 4


@pytest.mark.parametrize("trained_head", [False, True])
def test_a_second_derivative_is_refused(trained_head: bool) -> None:
    hidden, weight, targets, _ = given()
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    with pytest.raises(TrainingError, match="differentiable once; leave out create_graph"):
        linear_cross_entropy(hidden, weight, targets).sum().backward(create_graph=True)


# -- what does not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((N,), V)}, r"targets range from 17 to 17, token ids from 0 to 16"),
        ({"targets": torch.full((N,), -100)}, r"remove rows without a label"),
        ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, r"one token id \(an integer\) per row: \(11,\)"),
        ({"targets": torch.zeros(N)}, r"targets are \(11,\) torch.float32"),
        ({"weight": torch.zeros(V, D + 1)}, r"hidden \(11, 6\) and weight \(17, 7\) do not fit"),
        ({"bias": torch.zeros(V + 1)}, r"the bias has shape \(18,\); it must be \(17,\)"),
        ({"softcap": 0.0}, r"softcap=0.0"),
        ({"chunk": 0}, r"chunk=0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets, _ = given()
    with pytest.raises(TrainingError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | change))
