"""`peft.utils.merge_utils`: merging of tensors of one shape, such as the changes of one weight by several adapters.

`peftcore.merging.recipe` has the equation and the papers. `add_weighted_adapter` merges adapters in this way.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.hf_peft.reexports import reexported
from peftcore.merging.elementwise import merged_elements
from peftcore.merging.recipe import Recipe, check_density
from peftcore.merging.sparsify import sparsified

__all__ = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "reshape_weight_task_tensors",
    "task_arithmetic",
    "ties",
]

Signs = Literal["total", "frequency"]
"""Elected sign of an element: that of the sum, or that of most tensors."""


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return Σ wᵢτᵢ of tensors τ of one shape and their weights w (n,)."""
    return _merged(task_tensors, weights, Recipe())


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return Σ wᵢτᵢ, where each τ keeps its largest elements. density: share of elements to keep, in (0, 1]."""
    return _merged(task_tensors, weights, Recipe("magnitude", density))


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: Signs = "total"
) -> Tensor:
    """Return the mean of wᵢτᵢ over those i whose pruned τᵢ has the elected sign, element by element.

    Args:
        task_tensors: tensors of one shape.
        weights: (n,).
        density: share of each tensor's elements to keep, the largest, in (0, 1].
        majority_sign_method: "total", the sign of Σ τᵢ, or "frequency", the sign of most τᵢ.

    Raises:
        ConfigError: an argument is not valid.
    """
    return _merged(task_tensors, weights, _elected("magnitude", density, majority_sign_method))


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return Σ wᵢτᵢ, where each τ keeps a random share `density` of its elements, divided by that share."""
    return _merged(task_tensors, weights, Recipe("random", density, seed=None))


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: Signs = "total"
) -> Tensor:
    """Return the mean as `ties`, of tensors that keep elements at random as in `dare_linear`."""
    return _merged(task_tensors, weights, _elected("random", density, majority_sign_method))


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Return the tensor with all but a share of its elements set to zero.

    Args:
        tensor: of any shape.
        density: share of elements to keep, in (0, 1].
        method: "magnitude" keeps the largest elements, "random" elements at random, by PyTorch's generator.
        rescale: True divides elements that were kept at random by the density.

    Raises:
        ConfigError: an argument is not valid.
    """
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise ConfigError(f"method must be 'magnitude' or 'random'; got {method!r}")


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Return `prune(tensor, density, "magnitude")`."""
    return sparsified(tensor, Recipe("magnitude", density), None)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Return `prune(tensor, density, "random", rescale)`."""
    check_density("density", density)
    kept = torch.bernoulli(torch.full_like(tensor, density))
    return tensor * kept / (density if rescale else 1)


def calculate_majority_sign_mask(tensor: Tensor, method: Signs = "total") -> Tensor:
    """Return a mask (n, ...) of the elements of stacked tensors (n, ...) that have the elected sign.

    Raises:
        ConfigError: the method is not "total" or "frequency".
    """
    _check_signs(method)
    votes = tensor if method == "total" else tensor.sign()
    return torch.where(votes.sum(0) >= 0, tensor > 0, tensor < 0)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return the mean over the first axis of the elements of (n, ...) that are in the mask; 0 where there is none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp_min(1)


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Return the weights (n,) with as many axes as stacked tensors (n, ...) have."""
    return weights.reshape(*weights.shape, *(1 for _ in range(task_tensors.dim() - weights.dim())))


def _elected(sparsify: Literal["magnitude", "random"], density: float, method: Signs) -> Recipe:
    elect = "sum" if _check_signs(method) == "total" else "count"
    return Recipe(sparsify, density, elect=elect, elect_weighted=False, normalise="count", seed=None)


def _check_signs(method: Signs) -> Signs:
    if method not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method must be 'total' or 'frequency'; got {method!r}")
    return method


def _merged(tensors: Sequence[Tensor], weights: Tensor, recipe: Recipe) -> Tensor:
    numbers = torch.as_tensor(weights).tolist()
    recipe.check_weights(numbers)
    if len(tensors) != len(numbers):
        raise ConfigError(f"each tensor needs one weight: got {len(tensors)} tensors and {len(numbers)} weights")
    return merged_elements(tensors, numbers, recipe, None)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
