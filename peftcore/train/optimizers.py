"""Choice of the optimiser, and two optimisers that treat LoRA's factors A and B differently.

LoRA+: arXiv:2402.12354. LoRA-FA: arXiv:2308.03303. Both find the factors through the model's adapters, not
through parameter names.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from peftcore.adapter import Adapter
from peftcore.errors import ConfigError, TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.train.adamw import FusedAdamW


def check_optimizer(args: TrainingArguments) -> None:
    """Raise TrainingError if the optimiser does not run on this device."""
    name = str(getattr(args.optim, "value", args.optim))
    if "paged" in name and args.device.type != "cuda":
        raise TrainingError(
            f"{name} pages its state between GPU and CPU memory, but training runs on {args.device.type}; choose "
            f"{'adamw_bnb_8bit' if '8bit' in name else 'adamw_torch_fused'}"
        )


def in_one_call(optimizer_class: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return FusedAdamW and its options instead of torch's fused AdamW; return any other optimiser unchanged."""
    if optimizer_class is not torch.optim.AdamW or set(options) - {"lr", "betas", "eps", "fused"}:
        return optimizer_class, options
    if not options.get("fused"):
        return optimizer_class, options
    return FusedAdamW, {name: value for name, value in options.items() if name != "fused"}


def _factored(model: nn.Module) -> list[tuple[Adapter, LowRankBranch]]:
    """Return the active adapters that train two factors, each with these."""
    adapters = adapter_set(model)
    active = [a for name in adapters.selection.active for a in adapters.adapters(name).values()]
    layers = [(adapter, factors) for adapter in active if (factors := adapter.trained_factors()) is not None]
    if not layers:
        raise ConfigError("no active adapter is a LoRA; this optimiser needs LoRA factors")
    return layers


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Create a LoRA+ optimiser: B's learning rate is `loraplus_lr_ratio` times A's.

    Args:
        model: A PeftModel with an active LoRA.
        optimizer_cls: Class of the optimiser.
        lr: Learning rate of A.
        loraplus_lr_ratio: Ratio of B's learning rate to A's. Biases and other vectors get B's rate, without decay.
        loraplus_lr_embedding: Learning rate of a LoRA on an embedding.
        loraplus_weight_decay: Weight decay of matrices.
        options: Further arguments of `optimizer_cls`.

    Raises:
        ConfigError: No active adapter is a LoRA.
    """
    layers = _factored(model)
    embedding = {p for adapter, own in layers if adapter.base.kind == "embedding" for p in (own.a, own.b)}
    fast = {own.b for _, own in layers} - embedding
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, high = loraplus_weight_decay, lr * loraplus_lr_ratio
    groups = [
        {
            "params": [p for p in trained if p not in embedding and p not in fast and p.dim() != 1],
            "lr": lr,
            "weight_decay": decay,
        },
        {"params": [p for p in trained if p in embedding], "lr": loraplus_lr_embedding, "weight_decay": decay},
        {"params": [p for p in trained if p in fast], "lr": high, "weight_decay": decay},
        {
            "params": [p for p in trained if p not in embedding and p not in fast and p.dim() == 1],
            "lr": high,
            "weight_decay": 0.0,
        },
    ]
    make: Any = optimizer_cls
    return make([group for group in groups if group["params"]], lr=lr, **options)


class LoraFa(torch.optim.AdamW):
    """AdamW for LoRA with frozen A: B's gradient is projected so that the step approximates full fine-tuning.

    g ← s⁻² g (A Aᵀ)⁻¹, s: LoRA's scaling. Other trained parameters get plain AdamW.
    """

    def __init__(self, params: Any, layers: list[LowRankBranch], **options: Any):
        super().__init__(params, **options)
        self._layers = layers

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Project the gradients of B, then take AdamW's step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for layer in self._layers:
            if layer.b.grad is not None:
                layer.b.grad.copy_(_projected(layer, layer.b.grad))
        super().step()
        return loss


def _projected(layer: LowRankBranch, gradient: Tensor) -> Tensor:
    a = layer.a.flatten(1).float()
    inverse = torch.linalg.pinv(a @ a.T + 1e-8 * torch.eye(len(a), device=a.device))
    return (gradient.flatten(1).float() @ inverse).view_as(gradient) / layer.scaling**2


def create_lorafa_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0, **options: Any) -> LoraFa:
    """Freeze A of every active LoRA, and create the LoRA-FA optimiser of the other trained parameters.

    Args:
        model: A PeftModel with an active LoRA.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        options: Further arguments of torch.optim.AdamW.

    Raises:
        ConfigError: No active adapter is a LoRA, an adapted layer is not linear, or it uses DoRA.
    """
    layers = _factored(model)
    for adapter, factors in layers:
        if adapter.base.kind != "linear" or adapter.exact_factors() is None:
            raise ConfigError("LoRA-FA needs plain LoRA on linear layers; target linear layers only, without use_dora")
        factors.a.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return cast(Any, LoraFa)(trained, [factors for _, factors in layers], lr=lr, weight_decay=weight_decay, **options)
