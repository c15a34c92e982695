"""QERA's factors are those of the paper: A is Vᵀ R^(−½), B is U Σ."""

import torch

from peftcore.kernels.input_moments import cholesky_root
from peftcore.methods.lora.initialisation import truncated_svd
from peftcore.methods.lora.quantisation_error import error_directions
from peftcore.methods.lora.variants.qera import Qera


class Adapter:
    scaling = 0.5
    lora_A = torch.zeros(3, 8, dtype=torch.float64)


def test_the_factors_are_the_papers() -> None:
    torch.manual_seed(0)
    error, x = torch.randn(6, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    moment = x.T @ x / 50
    u, values = error_directions(error, moment, 3, 1e-12)
    adapter: object = Adapter()
    a, b = Qera.split(object.__new__(Qera), adapter, u, values, u.T @ error)  # type: ignore[arg-type]
    root = cholesky_root(moment, 1e-12)
    left, s, right = truncated_svd(error @ root, 3)
    torch.testing.assert_close(a, right @ torch.linalg.inv(root))
    torch.testing.assert_close(Adapter.scaling * b, left * s)
