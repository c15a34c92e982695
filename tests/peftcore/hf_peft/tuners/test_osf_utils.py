"""OSF's functions on a weight compute what HF PEFT's do."""

import peft.tuners.osf.utils as theirs
import pytest
import torch
from peftcore.tuners.osf import utils as ours


@pytest.mark.parametrize(("shape", "k"), [((6, 4), 2), ((4, 6), 1), ((4, 6), 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_decomposed_and_its_gradient_projected_as_in_hf_peft(
    shape: tuple[int, int], k: int, dtype: torch.dtype
) -> None:
    weight, direction = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = []
    for library in (ours, theirs):
        parts.append(part := library.decompose_weight_matrix(weight, k))
        rebuilt = ours.reconstruct_weight_matrix(part)  # HF PEFT has this function from 0.22 on
        torch.testing.assert_close(rebuilt, weight, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)
        (rebuilt * direction).sum().backward()
        library.project_gradient_to_orthogonal_space(part)
    assert list(parts[0]) == list(parts[1]) and parts[0]["rank_high"] == parts[1]["rank_high"] == min(k, 4)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for name in ("U_high", "S_high", "V_high", "U_low", "S_low", "V_low"):
        assert parts[0][name].requires_grad == parts[1][name].requires_grad == name.endswith("low")
        torch.testing.assert_close(parts[0][name], parts[1][name])
        if name.endswith("low") and parts[1][name].numel():
            torch.testing.assert_close(parts[0][name].grad, parts[1][name].grad, atol=tolerance, rtol=tolerance)


def test_a_projected_gradient_has_no_part_in_the_kept_directions() -> None:
    part = ours.decompose_weight_matrix(torch.randn(6, 4), 2)
    ours.project_gradient_to_orthogonal_space(part)  # without gradients, nothing happens
    ours.reconstruct_weight_matrix(part).square().sum().backward()
    ours.project_gradient_to_orthogonal_space(part)
    zeros = torch.zeros(2, 2)
    torch.testing.assert_close(part["U_high"].mT @ part["U_low"].grad, zeros, atol=1e-5, rtol=0)
    torch.testing.assert_close(part["V_low"].grad @ part["V_high"].mT, zeros, atol=1e-5, rtol=0)
