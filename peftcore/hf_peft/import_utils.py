"""`peft.import_utils`: which optional packages are installed."""

from functools import partial
from importlib.util import find_spec

import torch
import transformers

__all__ = [
    "is_aqlm_available",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_diffusers_available",
    "is_eetq_available",
    "is_gptqmodel_available",
    "is_hqq_available",
    "is_inc_available",
    "is_optimum_available",
    "is_te_available",
    "is_torchao_available",
    "is_transformers_ge_v5",
    "is_transformers_ge_v5_1_0",
    "is_transformers_ge_v5_4_0",
    "is_transformers_ge_v5_6_0",
    "is_transformers_ge_v5_13_0",
    "is_transformers_ge_v5_17_0",
    "is_transformers_le_4_53",
    "is_xpu_available",
]


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


is_aqlm_available = partial(_is_installed, "aqlm")
is_bnb_available = partial(_is_installed, "bitsandbytes")
is_bnb_4bit_available = is_bnb_available
is_diffusers_available = partial(_is_installed, "diffusers")
is_eetq_available = partial(_is_installed, "eetq")
is_gptqmodel_available = partial(_is_installed, "gptqmodel")
is_hqq_available = partial(_is_installed, "hqq")
is_inc_available = partial(_is_installed, "neural_compressor")
is_optimum_available = partial(_is_installed, "optimum")
is_te_available = partial(_is_installed, "transformer_engine")
is_torchao_available = partial(_is_installed, "torchao")

_TRANSFORMERS = tuple(int(number) for number in transformers.__version__.split(".")[:2])
is_transformers_le_4_53 = _TRANSFORMERS < (4, 54)
"""True with transformers 4.53 or older."""
is_transformers_ge_v5 = _TRANSFORMERS >= (5, 0)
"""True with transformers 5 or newer; each name below says its version."""
is_transformers_ge_v5_1_0 = _TRANSFORMERS >= (5, 1)
is_transformers_ge_v5_4_0 = _TRANSFORMERS >= (5, 4)
is_transformers_ge_v5_6_0 = _TRANSFORMERS >= (5, 6)
is_transformers_ge_v5_13_0 = _TRANSFORMERS >= (5, 13)
is_transformers_ge_v5_17_0 = _TRANSFORMERS >= (5, 17)


def is_xpu_available(check_device: bool = False) -> bool:
    """Return True if PyTorch can use an Intel GPU.

    Args:
        check_device: True also requires that a device is there.
    """
    return hasattr(torch, "xpu") and (torch.xpu.device_count() > 0 if check_device else torch.xpu.is_available())
