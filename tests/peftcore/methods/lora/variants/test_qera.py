"""QERA's factors are those of the paper, A = Vᵀ R^(−½) and B = U Σ, except for one number that goes from B to A."""

import torch

from peftcore.kernels.input_moments import cholesky_root
from peftcore.methods.lora.initialisation import truncated_svd
from peftcore.methods.lora.quantisation_error import error_directions
from peftcore.methods.lora.variants.qera import Qera


class Adapter:
    scaling = 0.5
    lora_A_weight = 0.1 * torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_factors_are_the_papers_at_the_scale_of_plain_lora() -> None:
    torch.manual_seed(0)
    error, x = torch.randn(6, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    moment = x.T @ x / 50
    u, values = error_directions(error, moment, 3, 1e-12)
    adapter: object = Adapter()
    a, b = Qera.split(object.__new__(Qera), adapter, u, values, u.T @ error, moment)  # type: ignore[arg-type]
    root = cholesky_root(moment, 1e-12)
    left, s, right = truncated_svd(error @ root, 3)
    c = (x @ Adapter.lora_A_weight.T).square().mean().sqrt()
    torch.testing.assert_close(a, c * right @ torch.linalg.inv(root))
    torch.testing.assert_close(c * Adapter.scaling * b, left * s)
    torch.testing.assert_close((x @ a.T).square().mean(0).sqrt(), c.expand(3))
