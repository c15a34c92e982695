"""`peft.import_utils`: which optional packages are installed."""

from importlib.util import find_spec

__all__ = ["is_bnb_4bit_available", "is_bnb_available", "is_xpu_available"]


def is_bnb_available() -> bool:
    """Return True if bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def is_bnb_4bit_available() -> bool:
    """Return True if bitsandbytes is installed; every version that works here has 4-bit layers."""
    return is_bnb_available()


def is_xpu_available(check_device: bool = False) -> bool:
    """Return True if PyTorch can use an Intel GPU.

    Args:
        check_device: True also requires that a device is there.
    """
    import torch

    return hasattr(torch, "xpu") and (torch.xpu.is_available() if check_device else torch.xpu._is_compiled())
