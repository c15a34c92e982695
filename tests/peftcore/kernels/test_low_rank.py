"""The fused low-rank forward equals plain autograd in float64, and saves nothing of the size of the output."""

import copy

import pytest
import torch
from quantised_layers import quantised
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peftcore.bases import BaseWeight, base_weight
from peftcore.kernels.low_rank import LowRankBranch, low_rank_linears
from peftcore.kernels.seeded_dropout import Dropout

IN, OUT, RANK, ROWS = 12, 9, 3, 7


def low_rank_linear(base: BaseWeight, x: Tensor, own: LowRankBranch) -> Tensor:
    (y,) = low_rank_linears(x, [(base, own)])
    return y


def layer_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = Conv1D(OUT, IN) if kind == "Conv1D" else nn.Linear(IN, OUT, bias=kind == "bias")
    return layer.to(dtype).requires_grad_(False)


def tensor(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def plain(layer: nn.Module, x: Tensor, own: LowRankBranch, dropping: Tensor | None = None) -> Tensor:
    """The formula as anyone would write it; dropping: what dropout multiplies each element with."""
    dropped = x if dropping is None else x * dropping.to(x)
    low_rank = own.scaling * F.linear(F.linear(dropped, own.a), own.b)
    y = layer(x) + low_rank
    return y if own.gain is None else y * own.gain


def gradients(y: Tensor, inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, g, retain_graph=True))


def next_factors(x: Tensor, p: float) -> Tensor:
    """What the next dropout will multiply the elements of x with."""
    state = torch.get_rng_state()
    dropout = Dropout(p)
    mask, _ = dropout.draw(x.detach().flatten(0, -2))
    torch.set_rng_state(state)
    return mask.keep.double().view(x.shape) * dropout.scale


@pytest.mark.parametrize("shape", [(ROWS, IN), (2, ROWS, IN), (1, 2, ROWS, IN)])
@pytest.mark.parametrize("kind", ["plain", "bias", "Conv1D", "gain"])
def test_equals_plain_autograd(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(kind), tensor(*shape)
    own = LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.7, 0.0, tensor(OUT) if kind == "gain" else None)
    inputs = [x, own.a, own.b] + ([] if own.gain is None else [own.gain])
    y = low_rank_linear(base_weight(layer), x, own)
    expected = plain(layer, x, own)
    assert y.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    g = torch.randn_like(expected)
    for mine, theirs in zip(gradients(y, inputs, g), gradients(expected, inputs, g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gain", [False, True])
def test_gradcheck_once_and_twice(gain: bool) -> None:
    torch.manual_seed(0)
    base, x, a, b = base_weight(layer_of("plain")), tensor(3, IN), tensor(RANK, IN), tensor(OUT, RANK)
    inputs = (x, a, b, *([tensor(OUT)] if gain else []))

    def run(x: Tensor, a: Tensor, b: Tensor, gain: Tensor | None = None) -> Tensor:
        return low_rank_linear(base, x, LowRankBranch(a, b, 0.7, 0.0, gain))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("gain", [False, True])
def test_sharing_layers_gradcheck_once_and_twice(gain: bool) -> None:
    torch.manual_seed(0)
    first, second = base_weight(layer_of("plain")), base_weight(layer_of("plain"))
    inputs = (
        tensor(3, IN),
        tensor(RANK, IN),
        tensor(OUT, RANK),
        tensor(2, IN),
        tensor(OUT, 2),
        *([tensor(OUT)] if gain else []),
    )

    def run(x: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, gain: Tensor | None = None) -> Tensor:
        other = LowRankBranch(a2, b2, 1.3, 0.0, gain)
        return torch.stack([*low_rank_linears(x, [(first, LowRankBranch(a, b, 0.7, 0.0, gain)), (second, other)])])

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_sharing_layers_equal_layers_apart() -> None:
    torch.manual_seed(0)
    layers, x = [layer_of("plain"), layer_of("bias"), layer_of("Conv1D")], tensor(2, ROWS, IN)
    owns = [LowRankBranch(tensor(r, IN), tensor(OUT, r), s) for r, s in ((3, 1.0), (1, 0.5), (4, 2.0))]
    inputs = [x, *(t for own in owns for t in own[:2])]
    ys = list(low_rank_linears(x, [(base_weight(layer), own) for layer, own in zip(layers, owns, strict=True)]))
    expected = [plain(layer, x, own) for layer, own in zip(layers, owns, strict=True)]
    g = torch.randn(3, 2, ROWS, OUT, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(ys), torch.stack(expected), atol=1e-12, rtol=0)
    mine, theirs = (gradients(torch.stack(outputs), inputs, g) for outputs in (ys, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_an_output_that_nobody_uses_gives_no_gradient() -> None:
    torch.manual_seed(0)
    layer, x = layer_of("plain"), tensor(ROWS, IN)
    own, other = (LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.0) for _ in range(2))
    y, _ = low_rank_linears(x, [(base_weight(layer), own), (base_weight(layer), other)])
    y.sum().backward()
    assert not other.a.grad.any() and not other.b.grad.any()
    expected = torch.autograd.grad(plain(layer, x, own).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gain", [False, True])
def test_outputs_may_be_changed_in_place(gain: bool) -> None:
    torch.manual_seed(0)
    layer, x = layer_of("plain"), tensor(2, ROWS, IN)
    owns = [
        LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.0, 0.0, tensor(OUT) if gain else None) for _ in range(2)
    ]
    first, second = low_rank_linears(x, [(base_weight(layer), own) for own in owns])
    first *= 3
    second[..., 0] += first[..., 1]
    expected = [plain(layer, x, own) for own in owns]
    expected[0] = expected[0] * 3
    total = expected[0].square().sum() + expected[1].square().sum()
    total = total + (2 * expected[1][..., 0] * expected[0][..., 1] + expected[0][..., 1].square()).sum()
    inputs = [x, *(t for own in owns for t in (own.a, own.b, own.gain) if t is not None)]
    mine = torch.autograd.grad(first.square().sum() + second.square().sum(), inputs)
    for one, other in zip(mine, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_equals_plain_autograd_with_the_same_mask(p: float) -> None:
    torch.manual_seed(0)
    layer, x, own = layer_of("bias"), tensor(2, ROWS, IN), LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.7, p)
    dropping = next_factors(x, p)
    assert 0 < dropping.count_nonzero() < dropping.numel()
    y = low_rank_linear(base_weight(layer), x, own)
    expected, inputs = plain(layer, x, own, dropping), [x, own.a, own.b]
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    g = torch.randn_like(expected)
    for mine, theirs in zip(gradients(y, inputs, g), gradients(expected, inputs, g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


def test_dropout_has_a_second_derivative() -> None:
    base, inputs = base_weight(layer_of("plain")), (tensor(3, IN), tensor(RANK, IN), tensor(OUT, RANK))

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same mask each time
        return low_rank_linear(base, x, LowRankBranch(a, b, 0.7, 0.3))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_of_everything_leaves_the_base(dtype: torch.dtype) -> None:
    layer, x = layer_of("bias", dtype), tensor(ROWS, IN, dtype=dtype)
    y = low_rank_linear(base_weight(layer), x, LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.0, 1.0))
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    layer, x = layer_of("bias", dtype), tensor(64, IN, dtype=dtype)
    own = LowRankBranch(tensor(RANK, IN, dtype=torch.float32), tensor(OUT, RANK, dtype=torch.float32), 0.5, dropout)
    dropping = next_factors(x, dropout) if dropout else None
    y = low_rank_linear(base_weight(layer), x, own)
    wide_layer = copy.deepcopy(layer).double()
    wide = LowRankBranch(
        own.a.detach().double().requires_grad_(), own.b.detach().double().requires_grad_(), 0.5, dropout
    )
    wide_x = x.detach().double().requires_grad_()
    expected = plain(wide_layer, wide_x, wide, dropping)
    g = torch.randn_like(y)
    mine = [y, *gradients(y, [x, own.a, own.b], g)]
    theirs = [expected, *gradients(expected, [wide_x, wide.a, wide.b], g.double())]
    assert y.dtype == dtype and mine[2].dtype == torch.float32
    for one, other in zip(mine, theirs, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["nf4", "nf4+double", "fp4", "int8", "Q4_1"])
def test_quantised_bases_equal_the_layers_own_autograd(kind: str) -> None:
    torch.manual_seed(0)
    layer = quantised(kind)
    layer.bias.requires_grad_(False)
    base = base_weight(layer)
    x = tensor(5, base.in_features, dtype=torch.float32)
    dtype = base.compute_dtype(x)
    assert dtype == torch.float32
    a, b = tensor(RANK, base.in_features, dtype=dtype), tensor(base.out_features, RANK, dtype=dtype)
    own = LowRankBranch(a, b, 0.5)
    y = low_rank_linear(base, x, own)
    expected, g = plain(layer, x, own), torch.randn(5, base.out_features)
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(gradients(y, [x, a, b], g), gradients(expected, [x, a, b], g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_what_is_kept_is_the_input_and_the_ranks_product() -> None:
    layer, x = nn.Linear(64, 512, bias=False).requires_grad_(False), tensor(128, 64, dtype=torch.float32)
    own = LowRankBranch(tensor(4, 64, dtype=torch.float32), tensor(512, 4, dtype=torch.float32), 1.0, 0.1)
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        low_rank_linear(base_weight(layer), x, own)
    owned = {t.data_ptr() for t in (x, own.a, own.b, layer.weight)}
    # A d(x), s·B in the type of the activations, and a bit for each element of the input
    others = {(tuple(t.shape), t.element_size()) for t in kept if t.data_ptr() not in owned}
    assert others == {((128, 4), 4), ((512, 4), 4), ((128 * 64 // 8,), 1)}


def test_without_gradient_nothing_is_traced() -> None:
    layer, x, own = layer_of("bias"), tensor(ROWS, IN), LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.0)
    with torch.no_grad():
        y = low_rank_linear(base_weight(layer), x, own)
    assert not y.requires_grad
    torch.testing.assert_close(y, plain(layer, x, own), atol=1e-12, rtol=0)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    layer, x, own = layer_of("bias"), tensor(ROWS, IN).detach(), LowRankBranch(tensor(RANK, IN), tensor(OUT, RANK), 1.0)
    low_rank_linear(base_weight(layer), x, own).sum().backward()
    assert x.grad is None
    expected = torch.autograd.grad(plain(layer, x, own).sum(), [own.a, own.b])
    torch.testing.assert_close([own.a.grad, own.b.grad], list(expected), atol=1e-10, rtol=0)


def test_rank_zero_is_the_base() -> None:
    layer, x = layer_of("bias"), tensor(ROWS, IN)
    y = low_rank_linear(base_weight(layer), x, LowRankBranch(tensor(0, IN), tensor(OUT, 0), 1.0))
    assert torch.equal(y, layer(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(layer(x).sum(), x)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["plain", "bias", "Conv1D", "gain", "nf4", "int8"])
def test_a_cpu_that_is_slow_in_16_bits_multiplies_in_float32(
    kind: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients are those of float64, rounded once to 16 bits; int8 computes as its package does."""
    torch.manual_seed(0)
    half, size = torch.bfloat16, 64
    if kind in ("nf4", "int8"):
        layer = quantised(kind)
        layer.compute_dtype = half
    else:
        layer = (Conv1D(32, size) if kind == "Conv1D" else nn.Linear(size, 32, bias=kind == "bias")).to(half)
    layer.requires_grad_(False)
    base = base_weight(layer, "layer")
    gain = torch.ones(32).add_(torch.randn(32) / 9).requires_grad_() if kind == "gain" else None
    own = LowRankBranch(
        tensor(RANK, size, dtype=torch.float32),
        tensor(32, RANK, dtype=torch.float32),
        0.3,
        p if gain is None else 0.0,
        gain,
    )
    x, g = torch.randn(40, size).to(half).requires_grad_(), torch.randn(40, 32).to(half)
    monkeypatch.setattr("peftcore.bases.compute_dtype._is_slow", lambda dtype: True)
    seen: list[torch.dtype] = []
    owner = next(one for one in type(base).__mro__ if "product" in vars(one))
    product = owner.product
    monkeypatch.setattr(owner, "product", lambda self, x: (seen.append(x.dtype), product(self, x))[1])
    factors = next_factors(x, own.dropout)
    y = low_rank_linear(base, x, own)
    assert y.dtype == half and seen[0] == (half if kind == "int8" else torch.float32)
    inputs = [x, own.a, own.b] + ([] if gain is None else [gain])
    found = gradients(y, inputs, g)
    wide = [one.detach().double().requires_grad_() for one in inputs]
    wide_own = LowRankBranch(wide[1], wide[2], 0.3, own.dropout, None if gain is None else wide[3])
    weight = base.read().double()
    bias = None if base.bias is None else base.bias.detach().double()
    dropped = wide[0] * factors
    expected = F.linear(wide[0], weight, bias) + 0.3 * F.linear(F.linear(dropped, wide_own.a), wide_own.b)
    expected = expected if gain is None else expected * wide[3]
    bound = {"int8": {"rtol": 0.05, "atol": 0.5}, "gain": {"rtol": 2**-6, "atol": 0.1}}
    bound = bound.get(kind, {"rtol": 2**-7, "atol": 0.02})
    torch.testing.assert_close(y.double(), expected, **bound)
    for one, other in zip(found, gradients(expected, wide, g.double()), strict=True):
        torch.testing.assert_close(one.double(), other, **bound)


def test_under_autocast_a_slow_cpu_computes_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("peftcore.bases.compute_dtype._is_slow", lambda dtype: True)
    base, x = base_weight(layer_of("bias", torch.float32), "layer"), torch.randn(ROWS, IN).bfloat16().requires_grad_()
    own = LowRankBranch(tensor(RANK, IN, dtype=torch.float32), tensor(OUT, RANK, dtype=torch.float32), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_linear(base, x, own)
    expected = (
        F.linear(x.double(), base.read().double(), base.bias.double())
        + 0.3 * x.double() @ own.a.double().T @ own.b.double().T
    )
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)
    g = torch.randn(ROWS, OUT)
    for one, other in zip(
        gradients(y, [x, own.a, own.b], g.bfloat16()), gradients(expected, [x, own.a, own.b], g.double()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.1)
