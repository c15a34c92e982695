"""The functions that merge tensors give HF PEFT's numbers."""

from collections.abc import Callable
from typing import Any

import peft.utils.merge_utils as theirs
import pytest
import torch
from peftcore.utils import merge_utils as ours

from peftcore import ConfigError

WEIGHTS = torch.tensor([1.0, -0.5, 2.0])


def tensors() -> list[torch.Tensor]:
    drawn = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    drawn[0, 0] = 0.0
    return list(drawn)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.task_arithmetic(tensors(), WEIGHTS),
        lambda m: m.magnitude_prune(tensors(), WEIGHTS, 0.4),
        lambda m: m.ties(tensors(), WEIGHTS, 0.4),
        lambda m: m.ties(tensors(), WEIGHTS, density=0.6, majority_sign_method="frequency"),
        lambda m: m.dare_linear(tensors(), WEIGHTS, 0.5),
        lambda m: m.dare_ties(tensors(), WEIGHTS, 0.5, "frequency"),
        lambda m: m.prune(tensors()[1], 0.3, "magnitude"),
        lambda m: m.prune(tensors()[1], 0.3, "random", rescale=True),
        lambda m: m.random_pruning(tensors()[1], 0.3, False),
        lambda m: m.magnitude_based_pruning(tensors()[1], 0.3),
        lambda m: m.calculate_majority_sign_mask(torch.stack(tensors())),
        lambda m: m.calculate_majority_sign_mask(torch.stack(tensors()), "frequency"),
        lambda m: m.disjoint_merge(torch.stack(tensors()), torch.stack(tensors()) > 0),
        lambda m: m.reshape_weight_task_tensors(torch.stack(tensors()), WEIGHTS),
    ],
)
def test_the_numbers_are_those_of_hf_peft(call: Callable[[Any], torch.Tensor]) -> None:
    torch.manual_seed(1)
    expected = call(theirs)
    torch.manual_seed(1)
    torch.testing.assert_close(call(ours), expected)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ours.ties(tensors(), WEIGHTS, 1.5), "density must be above 0 and at most 1"),
        (lambda: ours.ties(tensors(), WEIGHTS, 0.5, "most"), "must be 'total' or 'frequency'; got 'most'"),  # type: ignore[arg-type]
        (lambda: ours.task_arithmetic(tensors(), WEIGHTS[:2]), "got 3 tensors and 2 weights"),
        (lambda: ours.prune(tensors()[0], 0.5, "largest"), "must be 'magnitude' or 'random'; got 'largest'"),  # type: ignore[arg-type]
        (lambda: ours.random_pruning(tensors()[0], 0.0, rescale=True), "density must be above 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call()
