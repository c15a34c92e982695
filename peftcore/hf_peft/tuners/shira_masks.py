"""`peft.tuners.shira.mask_functions`: masks for `ShiraConfig.mask_fn`."""

import torch
from torch import Tensor, nn

from peftcore.errors import LayerKindError
from peftcore.hf_peft.tuners.tuners_utils import _get_in_out_features
from peftcore.kernels.maths import random_places

__all__ = ["random_mask"]


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None) -> Tensor:
    """Return a mask (out_features, in_features) with r (out_features + in_features) ones at random places.

    Args:
        base_layer: a linear layer.
        r: the rank whose LoRA has as many parameters.
        random_seed: seed of the places; None: a constant one.

    Raises:
        LayerKindError: the layer has no such sizes.
    """
    columns, rows = _get_in_out_features(base_layer)
    if rows is None or columns is None:
        raise LayerKindError(f"random_mask takes a linear layer; got {type(base_layer).__name__}")
    mask = torch.zeros(rows * columns)
    mask[random_places(rows * columns, r * (rows + columns), random_seed)] = 1
    return mask.view(rows, columns).to(next(base_layer.parameters()).device)
