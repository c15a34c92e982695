"""Views of unquantised layers: the canonical weight gives the output, and maps act on the feature axis."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore.bases import base_weight

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(2, 3, 6), (4, 6)),
    "Conv1D": (lambda: Conv1D(4, 6), lambda: torch.randn(2, 3, 6), (4, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), lambda: torch.randn(2, 6, 9), (4, 6, 3)),
    "Conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2), lambda: torch.randn(2, 6, 9, 9), (4, 3, 3, 3)),
    "Conv2d, reflect": (
        lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 6, 9, 9),
        (4, 6, 3, 3),
    ),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 2), lambda: torch.randn(2, 6, 5, 5, 5), (4, 6, 2, 2, 2)),
    "Embedding": (lambda: nn.Embedding(10, 4), lambda: torch.randint(10, (2, 3)), (4, 10)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_canonical_weight_gives_the_output(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, shape = LAYERS[name]
    layer, x = make().double(), inputs()
    x = x.double() if x.is_floating_point() else x
    base = base_weight(layer)
    assert tuple(base.read().shape) == shape and base.out_features == shape[0]
    y = layer(x)
    without_bias = y if base.bias is None else y - base.per_output(base.bias)
    torch.testing.assert_close(base.apply(x, base.read()), without_bias)
    state, weight = base.state(), torch.randn(shape).double()
    base.write(weight)
    assert torch.equal(base.read(), weight)
    base.restore(state)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", LAYERS)
def test_a_pointwise_map_acts_on_the_feature_axis(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, shape = LAYERS[name]
    layer, x = make(), inputs()
    base, axis = base_weight(layer), 1 if "Conv" in name and name != "Conv1D" else -1
    h = base.apply(x, base.read())
    weight = torch.randn(5, shape[0])
    kernel = weight.view(5, shape[0], *(1 for _ in base.kernel))
    expected = (h.movedim(axis, -1) @ weight.T).movedim(-1, axis)
    torch.testing.assert_close(base.pointwise(h, kernel), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base.add_pointwise(expected, h, kernel), 2 * expected, atol=1e-5, rtol=1e-5)
