"""Where LoRA begins, from the base weight alone.

PiSSA: arXiv:2404.02948. OLoRA: arXiv:2406.01775. LoftQ: arXiv:2310.08659.
A start gives A and B; those that take s·BA out of the base give back A₀ and B₀, and LoftQ a new base weight.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError, TargetError, require_extra

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora

Factors = tuple[Tensor, Tensor]
"""A (r, i) and B (o, r) for s·BA."""


def begin(adapter: "Lora") -> tuple[Factors | None, Tensor | None]:
    """Set A and B; gives (A₀ and B₀ to take out of the base, a weight to put in the base's place)."""
    start = adapter.config.init_lora_weights
    if needs_only_factors(start):
        _at_random(adapter, start)
        return None, None
    if adapter.base.kind != "linear":
        raise TargetError(f"init_lora_weights={start!r} fits linear layers only; exclude the {adapter.base.kind} ones")
    if start == "orthogonal":
        put(adapter, orthogonal(adapter.r, adapter.base.in_features, adapter.base.out_features))
        return None, None
    loftq = start == "loftq"
    weight = (adapter.base.read_original() if loftq else adapter.base.read_unmerged()).float()
    if adapter.r > min(weight.shape):
        raise ConfigError(f"r={adapter.r} exceeds the weight's {min(weight.shape)} singular vectors; take a smaller r")
    if loftq:
        return None, _loftq(adapter, weight)
    factors = olora(weight, adapter.r) if start == "olora" else pissa(weight, adapter.r, adapter.scaling, str(start))
    put(adapter, factors)
    return taken_out(adapter), None


def needs_only_factors(start: bool | str) -> bool:
    """Whether a start sets A and B and nothing else, so that it is nothing where those are read from disk."""
    return isinstance(start, bool) or start in ("gaussian", "eva", "corda", "lora_ga")


def taken_out(adapter: "Lora") -> Factors:
    """A₀ and B₀: copies of the factors as they are now, to take out of the base."""
    a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
    return a.clone(memory_format=torch.contiguous_format), b.clone(memory_format=torch.contiguous_format)


def put(adapter: "Lora", factors: Factors) -> None:
    """Copy A and B into the adapter."""
    adapter.lora_A.copy_(factors[0].view_as(adapter.lora_A))
    adapter.lora_B.copy_(factors[1].view_as(adapter.lora_B))


def _at_random(adapter: "Lora", start: bool | str) -> None:
    zero, other = adapter.lora_B, adapter.lora_A
    if adapter.base.kind == "embedding":
        zero, other = other, zero
    if start == "gaussian":
        nn.init.normal_(other, std=1 / adapter.r)
    elif adapter.base.kind == "embedding":
        nn.init.normal_(other)
    else:
        nn.init.kaiming_uniform_(other, a=math.sqrt(5))
    if start is False:
        nn.init.normal_(zero, std=0.02)
    else:
        nn.init.zeros_(zero)


def orthogonal(r: int, inputs: int, outputs: int) -> Factors:
    """A and B with BA = 0 and neither zero: they use the odd and the even rows of one orthogonal (r, r) matrix."""
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a = (torch.randn(inputs, r // 2) @ q[0::2]).T / 10
    b = (torch.randn(r // 2, outputs).T @ q[1::2]) / 10
    return a, b


def pissa(weight: Tensor, r: int, scaling: float, name: str = "pissa") -> Factors:
    """s·BA is the best rank-r approximation of W; "pissa_niter_N" finds it by N power iterations."""
    if name == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(name.rsplit("_", 1)[-1]))
        vh = v.T
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def olora(weight: Tensor, r: int) -> Factors:
    """B the first r orthonormal columns of W = QR, A the first r rows of R."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def low_rank(residual: Tensor, r: int, scaling: float) -> Factors:
    """s·BA is the best rank-r approximation of a residual, its singular values shared by both sides."""
    return pissa(residual, r, scaling)


def _loftq(adapter: "Lora", weight: Tensor) -> Tensor:
    if adapter.base.quantized:
        raise TargetError(
            "init_lora_weights='loftq' needs the 16-bit weight, and this base is quantised already; call "
            "peftcore.init.replace_lora_weights_loftq(model, directory of the original) after get_peft_model"
        )
    options: dict[str, Any] = {"loftq_bits": 4, "loftq_iter": 1, **(adapter.config.loftq_config or {})}
    residual, quantised = weight, weight
    for _ in range(options["loftq_iter"]):
        quantised = _quantise_and_back(residual, options["loftq_bits"])
        factors = low_rank(weight - quantised, adapter.r, adapter.scaling)
        residual = weight - adapter.scaling * factors[1] @ factors[0]
        put(adapter, factors)
    return quantised


def _quantise_and_back(weight: Tensor, bits: int) -> Tensor:
    if bits == 4:
        require_extra("quant", "init_lora_weights='loftq'", "bitsandbytes")
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4")
        return bnb.dequantize_4bit(codes, state).to(weight)
    scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale * 127).round() * scale / 127
