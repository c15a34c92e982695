"""VeLoRA: the gradient of A is computed from a compressed input, which saves memory in training. arXiv:2405.17991.

The forward pass is LoRA's. The input x (n, i) is cut into g groups of d features; of each group only the product with
one direction v is kept for the backward pass. There the group counts as (that product)·v, times `scale`.
Shapes: n tokens, i in_features, r rank, g groups, d = ⌈i/g⌉; v (d,) of length 1.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.errors import ConfigError
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.methods.lora.options import Options
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora

_STARTS = ("batch_average_once", "batch_average", "random")


class VeloraConfig(Options):
    """Options of VeLoRA, for `LoraConfig(velora_config=...)`. arXiv:2405.17991.

    Args:
        num_groups: groups g of the input's features; more groups keep more of the input.
        scale: factor of the input that the backward pass rebuilds.
        init_type: the direction v: the mean of the groups of every batch ("batch_average"), of the first batch
            ("batch_average_once"), or "random".

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(self, num_groups: int = 64, scale: float = 1.0, init_type: str = "batch_average"):
        for name, value in (("num_groups", num_groups), ("scale", scale)):
            if value <= 0:
                raise ConfigError(f"VeloraConfig: `{name}` should be positive, got {value}.")
        if init_type not in _STARTS:
            raise ConfigError(f"VeloraConfig: `init_type` must be one of {', '.join(_STARTS)}; got {init_type!r}")
        super().__init__(num_groups=num_groups, scale=scale, init_type=init_type)


@register_variant
class Velora(Variant):
    """Variant for `velora_config=VeloraConfig(...)`: training keeps a compressed input for the gradient of A."""

    option = "velora_config"
    options_class = VeloraConfig
    stands_alone = True
    keys: ClassVar = {"lora_velora_embed": "lora_velora_embed"}

    def add_parameters(self, lora: "Lora") -> None:
        lora.register_buffer(
            "lora_velora_embed", torch.zeros(-(-lora.base.in_features // _options(lora)["num_groups"]))
        )
        lora.lora_velora_initialized = False

    def reset_parameters(self, lora: "Lora") -> None:
        lora.lora_velora_initialized = random = _options(lora)["init_type"] == "random"
        if random:  # as HF PEFT draws it: in the base's type, on its device
            base, (size,) = lora.base, lora.get_buffer("lora_velora_embed").shape
            dtype = torch.get_default_dtype() if base.quantized else base.dtype
            drawn = torch.randn(size, dtype=dtype, device=base.device)
            lora.get_buffer("lora_velora_embed").copy_(_normalized(drawn).to(dtype))

    def prepare_to_read(self, lora: "Lora") -> None:
        lora.lora_velora_initialized = _options(lora)["init_type"] == "random"

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch | None:
        return None if _compresses(lora) else branch

    def product(self, lora: "Lora", x: Tensor, a: Tensor) -> Tensor | None:
        if not _compresses(lora):
            return None
        options = _options(lora)
        _update(lora, x.detach(), options)
        direction = lora.get_buffer("lora_velora_embed")
        return _Compressed.apply(x, a.to(x.dtype), direction, options["num_groups"], options["scale"])

    def checkpoint_tensors(self, lora: "Lora") -> dict[str, Tensor]:
        return {"lora_velora_embed": lora.get_buffer("lora_velora_embed").detach()}


def _options(lora: "Lora") -> dict[str, Any]:
    options = lora.config.velora_config
    assert options is not None
    return options


def _compresses(lora: "Lora") -> bool:
    return lora.training and torch.is_grad_enabled()


def _groups(x: Tensor, groups: int) -> Tensor:
    """Return the groups (n, g, d) of an input (..., i), the last one filled up with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


def _normalized(direction: Tensor) -> Tensor:
    """Return v of length 1 in float32; for v = 0 the direction in which all features are equal."""
    direction = direction.float()
    length = torch.linalg.vector_norm(direction)
    return torch.where(length > 0, direction / length, torch.full_like(direction, len(direction) ** -0.5))


@torch.no_grad()
def _update(lora: "Lora", x: Tensor, options: dict[str, Any]) -> None:
    """Set v to the mean of the groups of an input, if `init_type` asks for it now."""
    if options["init_type"] == "random" or (options["init_type"] == _STARTS[0] and lora.lora_velora_initialized):
        return
    present = lora.get_buffer("lora_velora_embed")
    mean = _groups(x, options["num_groups"]).flatten(0, 1).mean(0)
    # a new tensor, because the backward pass of an earlier call may still need the present one
    lora._buffers["lora_velora_embed"] = _normalized(mean).to(present)
    vars(lora)["lora_velora_initialized"] = True


class _Compressed(torch.autograd.Function):
    """x Aᵀ, whose backward pass needs the compressed input (n, g) only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, direction: Tensor, groups: int, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(_groups(x, groups) @ direction.to(x), a, direction)
        return F.linear(x, a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        compressed, a, direction = ctx.saved_tensors
        gradient_of_x = gradient @ a if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gradient_of_x, None, None, None, None
        by_group = gradient.flatten(0, -2).T @ compressed  # (r, g)
        whole = (by_group[..., None] * direction.to(by_group)).flatten(1)[:, : a.shape[1]]
        return gradient_of_x, whole * ctx.scale, None, None, None
