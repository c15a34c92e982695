"""Masks of SHiRA: HF PEFT's function."""

from functools import partial

import pytest
import torch
from peft.tuners.shira.mask_functions import random_mask as theirs
from peftcore.tuners.shira.mask_functions import random_mask
from torch import nn

from peftcore import ShiraConfig, get_peft_model
from peftcore.errors import LayerKindError


@pytest.mark.parametrize("seed", [None, 3])
def test_the_mask_is_that_of_hf_peft_and_can_be_given_as_mask_fn(seed: int | None) -> None:
    layer = nn.Linear(7, 5)
    assert torch.equal(random_mask(layer, 2, seed), theirs(layer, 2, seed).float())
    config = ShiraConfig(r=2, target_modules=["0"], mask_type="own", init_weights=False)
    config.mask_fn = partial(random_mask, random_seed=seed)
    model = get_peft_model(nn.Sequential(layer), config)
    assert torch.equal(model[0].get_delta_weight("default") != 0, random_mask(layer, 2, seed).bool())


def test_other_layers_are_refused() -> None:
    with pytest.raises(LayerKindError, match="takes a linear layer; got ReLU"):
        random_mask(nn.ReLU(), 2)
