"""CLoQ's factors are those of the paper: with R = CᵀC, A is the truncated SVD's U Σ seen through C⁻¹, B is V."""

import torch

from peftcore.methods.lora.quantisation_error import error_directions
from peftcore.methods.lora.variants.cloq import Cloq


class Adapter:
    scaling = 2.0


def test_the_factors_are_the_papers() -> None:
    torch.manual_seed(0)
    error, x = torch.randn(6, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    moment = x.T @ x / 50
    adapter: object = Adapter()
    u, values = error_directions(error, moment, 3, Cloq.damping)
    a, b = Cloq.split(object.__new__(Cloq), adapter, u, values, u.T @ error, moment)  # type: ignore[arg-type]
    # the paper's weights are (i, o): C ΔW = U Σ Vᵀ, A = C⁻¹ U Σ, B = V, with C from the damped moment's eigenvectors
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(8)
    spectrum, vectors = torch.linalg.eigh(damped)
    c = spectrum.sqrt()[:, None] * vectors.T
    left, s, right = torch.linalg.svd(c @ error.T, full_matrices=False)
    papers = torch.linalg.inv(c) @ (left[:, :3] * s[:3])
    signs = torch.diag(right[:3] @ b).sign()
    torch.testing.assert_close(b, right[:3].T * signs)
    torch.testing.assert_close(Adapter.scaling * a, (papers * signs).T)
