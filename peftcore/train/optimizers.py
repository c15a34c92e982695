"""Choice of the optimiser, and three optimisers that know LoRA's factors A and B.

LoRA+: arXiv:2402.12354. LoRA-FA: arXiv:2308.03303. Riemannian preconditioning: arXiv:2402.02347. They find the factors
through the model's adapters, not through parameter names.
"""

import inspect
from collections.abc import Callable, Collection
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
    return make(groups, lr=lr, **options)  # with the empty ones, so that a group is at the index that it has in PEFT


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
        ConfigError: No active adapter is a LoRA, an adapted layer is neither linear nor an embedding, or it uses DoRA.
    """
    layers = _factored(model)
    for adapter, factors in layers:
        if adapter.base.kind not in ("linear", "embedding") or adapter.exact_factors() is None:
            raise ConfigError(
                "LoRA-FA needs plain LoRA on linear layers and embeddings; target these only, without use_dora"
            )
        factors.a.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return cast(Any, LoraFa)(trained, [factors for _, factors in layers], lr=lr, weight_decay=weight_decay, **options)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], lr: float, reg: float = 1e-2, **options: Any
) -> torch.optim.Optimizer:
    """Create an optimiser that scales the gradients of LoRA's factors before each of its steps.

    g_A ← (BᵀB + reg·I)⁻¹ g_A and g_B ← g_B (A Aᵀ + reg·I)⁻¹, with the factors from before the step. With reg = 0 the
    gradient step of the product BA does not depend on how it is split into factors. Scaled are linear layers whose A
    and B both train, with DoRA, too. The gradients of all other parameters stay as they are.

    Args:
        model: A PeftModel with an active LoRA.
        optimizer_cls: Class of the optimiser, such as torch.optim.AdamW. The result is an instance of a subclass.
        lr: Learning rate.
        reg: Damping, added to the diagonals of the (r, r) matrices; at least 0.
        options: Further arguments of `optimizer_cls`.

    Raises:
        TypeError: `optimizer_cls` is no class of optimisers.
        ConfigError: No active adapter trains both factors of a linear layer; `reg` is negative; or the optimiser
            requires a closure, whose gradients would not be scaled. The result's `step` raises it for a closure.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer; got {optimizer_cls!r}")
    if not reg >= 0:
        raise ConfigError(f"create_riemannian_optimizer: reg must be at least 0; got {reg}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"create_riemannian_optimizer: {optimizer_cls.__name__} requires a closure, whose gradients would not be "
            "scaled; take an optimiser whose step needs none, such as AdamW or SGD"
        )
    pairs = [
        (factors.a, factors.b)
        for adapter, factors in _factored(model)
        if adapter.base.kind == "linear" and factors.a.requires_grad and factors.b.requires_grad
    ]
    if not pairs:
        raise ConfigError(
            "create_riemannian_optimizer: no active LoRA trains both lora_A and lora_B of a linear layer; target one, "
            "and let both train"
        )

    class Riemannian(optimizer_cls):
        """The given optimiser, with the gradients of LoRA's factors scaled first."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            """Scale the gradients, then take the optimiser's step."""
            if closure is not None:
                raise ConfigError(
                    "this optimiser takes no closure, whose gradients would not be scaled; compute the gradients, then "
                    "call step()"
                )
            _precondition(pairs, reg)
            return super().step()

    make: Any = Riemannian
    return make([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


@torch.no_grad()
def _precondition(pairs: Collection[tuple[Tensor, Tensor]], reg: float) -> None:
    """Scale the gradients of the factors A (r, i) and B (o, r) in place, in float32 at least."""
    sides = [(a.grad, b.T) for a, b in pairs] + [(None if b.grad is None else b.grad.T, a) for a, b in pairs]
    by_shape: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for gradient, other in sides:  # both (r, any number)
        if gradient is not None:
            dtype = torch.promote_types(other.dtype, torch.float32)
            by_shape.setdefault((len(other), dtype, other.device), []).append((gradient, other.to(dtype)))
    for (rank, dtype, device), alike in by_shape.items():
        grams = torch.stack([other @ other.T for _, other in alike]) + reg * torch.eye(rank, dtype=dtype, device=device)
        inverses = torch.linalg.pinv(grams, hermitian=True)  # in one call, and defined where a factor is zero
        for (gradient, _), inverse in zip(alike, inverses, strict=True):
            gradient.copy_(inverse @ gradient.to(dtype))
