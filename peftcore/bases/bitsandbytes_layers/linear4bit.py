"""bitsandbytes' 4-bit linear layer without the permanent repacking, and as fast for few tokens.

bitsandbytes repacks the codes of a layer at its first forward in eval mode on a CPU with bfloat16 instructions. The
repacked layer has no backward pass and rounded scales.
"""

from typing import Any

import torch
from torch import Tensor

from peftcore.bases.quantized import FourBitWeight
from peftcore.errors import require_extra

require_extra("quant", __name__, "bitsandbytes")

from bitsandbytes.nn import modules  # noqa: E402


class Linear4bit(modules.Linear4bit):
    """A `bitsandbytes.nn.Linear4bit` that never changes its codes; of the same name, which programs look for.

    For few tokens it multiplies by a packed copy of the codes, which it drops at the next long input. A layer becomes
    one by `keep_codes`; it stays the same object.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b (..., o), of the type of x (..., i)."""
        if (
            torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
            or torch._C._is_any_autocast_enabled()
            or x.dtype is not self.compute_dtype
            or getattr(self.weight, "quant_state", None) is None
        ):
            return super().forward(x)
        view: FourBitWeight | None = self.__dict__.get("_view")
        if view is None:
            view = self.__dict__["_view"] = FourBitWeight(self)
        if (torch.is_grad_enabled() and x.requires_grad) or not view.can_use_packed(x):
            view.clear_cache()
            return super().forward(x)
        return view.product(x)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_view"}
