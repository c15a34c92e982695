"""Faster quantisation by bitsandbytes on CPUs, by compiled code in place of PyTorch's calls."""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from peftcore.compiled.quantization import compiled, quantize_4bit
from peftcore.errors import require_extra

logger = logging.getLogger(__name__)

OPERATION = "bitsandbytes::quantize_4bit"
"""PyTorch's name of the operation that quantises to NF4 and FP4."""
TYPES = ("nf4", "fp4")


@cache
def use_compiled_quantization() -> bool:
    """Let bitsandbytes quantise to NF4 and FP4 on CPUs by compiled code, in this process.

    A model is quantised when transformers loads it with a `BitsAndBytesConfig`, and in merging. Codes and scales are
    those of bitsandbytes, to the bit; some random weights are quantised in both ways first.

    Returns:
        True if the compiled code is used; False, with the reason in the log, if nothing can be compiled, or this
        version of bitsandbytes has code of its own or other codes.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    require_extra("quant", "use_compiled_quantization", "bitsandbytes")
    import_module("bitsandbytes")  # defines the operation
    if compiled() is None:
        reason = "nothing can be compiled here"
    elif torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        reason = "it has compiled code of its own"
    elif not _has_the_same_codes():
        reason = "the codes of this version differ"
    else:
        torch.library.register_kernel(OPERATION, "cpu", _quantize)
        return True
    logger.info("bitsandbytes quantises by its own code: %s", reason)
    return False


def _quantize(weight: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes and scales in the form of bitsandbytes' operation."""
    codes, scales = quantize_4bit(weight, _values(quant_type), blocksize)
    return (codes if quant_storage == torch.uint8 else codes.squeeze().view(quant_storage).unsqueeze(1)), scales


def _values(quant_type: str) -> Tensor:
    """Return the value of each code (16,)."""
    functional: Any = import_module("bitsandbytes.functional")
    return functional.get_4bit_type(quant_type, device="cpu")


def _has_the_same_codes() -> bool:
    quantize = getattr(torch.ops, OPERATION.partition("::")[0]).quantize_4bit.default
    weight = torch.randn(4099, generator=torch.Generator().manual_seed(0))
    arguments = [(weight, 64, kind, torch.uint8) for kind in TYPES]
    return all(torch.equal(*pair) for each in arguments for pair in zip(quantize(*each), _quantize(*each), strict=True))
