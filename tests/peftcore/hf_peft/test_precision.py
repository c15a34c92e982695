import peft
import pytest
import torch
from torch import nn

import peftcore


def test_frozen_parameters_become_16_bit_and_trainable_ones_32_bit_as_in_peft() -> None:
    dtypes = []
    for library in (peftcore, peft):
        base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
        library.cast_mixed_precision_params(model, torch.bfloat16)
        dtypes.append(sorted((str(p.dtype), p.requires_grad, p.shape) for p in model.parameters()))
    assert dtypes[0] == dtypes[1]


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.float16 or torch\.bfloat16; got 'bf16'"):
        peftcore.cast_mixed_precision_params(nn.Linear(2, 2), "bf16")  # type: ignore[arg-type]
