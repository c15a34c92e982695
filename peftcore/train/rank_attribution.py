"""Attribution of a loss reduction to the singular components of LoRA updates, by integrated gradients.

ΔW = Σ_k σ_k u_k v_kᵀ: update of a layer. G(t): gradient of the loss L at W + tΔW.

    a_k = −∫₀¹ ⟨G(t), σ_k u_k v_kᵀ⟩ dt,    Σ a_k over the components of all layers = L(0) − L(1)

The integral is computed by two-point Gauss-Legendre quadrature. G is never formed: if B and A hold the components, the
sum of B ⊙ ∂L/∂B over out_features is t⟨G(t), ΔW_k⟩. arXiv:1703.01365.

Shapes: i in_features, o out_features, r rank; A (r, i), B (o, r).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.methods.lora import Lora
from peftcore.train.losses import token_losses
from peftcore.train.model_loss import ModelLossCheck, has_causal_loss

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward, with labels."""
_NODES = ((0.5 - math.sqrt(1 / 12), 0.5), (0.5 + math.sqrt(1 / 12), 0.5))
"""(t, weight) of the two-point Gauss-Legendre rule on [0, 1]."""


def summed_loss(model: nn.Module, batch: Batch, check: ModelLossCheck) -> tuple[Tensor, int]:
    """Return the summed loss and the number of supervised tokens, or of rows if the model has another loss.

    Args:
        model: The model, with or without adapters.
        batch: Keyword arguments of its forward, with labels.
        check: The comparison of losses, one object for all batches of a search.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "labels" in batch and has_causal_loss(model) and check.agrees(model, inputs, batch["labels"]):
        losses, _ = token_losses(model, inputs, batch["labels"])
        return losses.sum(), len(losses)
    loss = model(**batch).loss
    if loss is None:
        raise ConfigError("find_ranks needs the model's loss: give batches with labels")
    rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    return loss * rows, rows


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], check: ModelLossCheck) -> float:
    """Return the mean loss (nats) of all batches."""
    sums = [summed_loss(model, batch, check) for batch in batches]
    return sum(total.item() for total, _ in sums) / sum(count for _, count in sums)


@torch.no_grad()
def to_singular_directions(adapter: Lora) -> Tensor:
    """Rewrite B and A as U√Σ and √ΣVᵀ of their product, and return the singular values (r,) of scaling·BA."""
    q_out, b = torch.linalg.qr(adapter.lora_B_weight.double())
    q_in, a = torch.linalg.qr(adapter.lora_A_weight.double().T)
    u, values, vh = torch.linalg.svd(b @ a.T)
    root = values.sqrt()
    adapter.lora_B_weight.copy_(q_out @ u * root)
    adapter.lora_A_weight.copy_((q_in @ vh.T * root).T)
    return values * adapter.scaling


@contextlib.contextmanager
def scaled(adapters: Mapping[str, Lora], t: float) -> Iterator[None]:
    """Multiply the adapters' updates by t inside."""
    before = {path: float(adapter.scaling) for path, adapter in adapters.items()}
    for path, adapter in adapters.items():
        adapter.scaling = t * before[path]
    try:
        yield
    finally:
        for path, adapter in adapters.items():
            adapter.scaling = before[path]


def attribute_loss(
    model: nn.Module,
    adapters: Mapping[str, Lora],
    batches: Sequence[Batch],
    check: ModelLossCheck,
    seen: Callable[[], object],
) -> dict[str, Tensor]:
    """Return {path: (r,)}, the reduction of the mean loss in nats by each component; call `seen` after each batch."""
    credits = {
        path: torch.zeros(a.r, dtype=torch.float64, device=a.lora_B_weight.device) for path, a in adapters.items()
    }
    for t, weight in _NODES:
        count = 0
        with scaled(adapters, t):
            for batch in batches:
                total, items = summed_loss(model, batch, check)
                total.backward()
                count += items
                seen()
        for path, adapter in adapters.items():
            assert adapter.lora_B_weight.grad is not None
            along = (adapter.lora_B_weight.detach() * adapter.lora_B_weight.grad).sum(0, dtype=torch.float64)
            credits[path] -= weight * along / (t * count)
        for parameter in model.parameters():
            parameter.grad = None
    return credits
