"""Hooks for one forward that restrict an output head to supervised positions, or compute losses in its place.

To find out how the model processes the head's output (scale, soft-cap), the hooks can send probes through the head: the
hidden states of the first and the last supervised position, multiplied by growing factors.

Shapes: B rows of text, T positions, P virtual tokens before them, d hidden width, V vocabulary, n supervised tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.detection.head import LogitTransform
from peftcore.errors import TrainingError
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.forward_paths import contiguous_input
from peftcore.layers.saved_module import SavedModule
from peftcore.train.linear_cross_entropy import linear_cross_entropy

_PROBE_FACTORS = (1, 8, 64, 512)
"""Factors of the probes: the small logits of an untrained model would not show a soft-cap."""


@dataclass
class HeadResult:
    """Losses (n,) or logits (n, V) of the supervised tokens."""

    losses: Tensor | None = None
    logits: Tensor | None = None


def flat_indices(mask: Tensor, states: Tensor) -> Tensor:
    """Return the indices (n,) of the true positions of `mask` (B, T) in `states` (B, P + T, ...), flattened to rows."""
    virtual = states.shape[1] - mask.shape[1]
    if virtual < 0:
        raise TrainingError(
            f"the model returns logits of {states.shape[1]} positions for {mask.shape[1]} labels; omit logits_to_keep"
        )
    return F.pad(mask, (virtual, 0)).flatten().nonzero().squeeze(1).to(states.device)


class HeadHooks:
    """Hooks on an output head for one forward, and their results.

    Args:
        head: The model's output head.
        mask: (B, T), true at positions whose next token is supervised.
        targets: (n,) token ids to compute losses of. None: only logits are needed.
        transform: The model's processing of the head's output. None: unknown, so losses cannot be computed here.
        probes: Send probes through the head instead of the supervised rows.
    """

    def __init__(
        self,
        head: nn.Module,
        mask: Tensor,
        targets: Tensor | None,
        transform: LogitTransform | None,
        probes: bool = False,
    ) -> None:
        self.head, self.mask, self.targets, self.transform = head, mask, targets, transform
        self.linear = plain_linear(head) if targets is not None and transform is not None else None
        self.sends_probes = probes
        self.calls = self.rows = 0
        self.fits = False
        self.losses: Tensor | None = None
        self.product: Tensor | None = None

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Return the output of the model with the hooks in place, and remove the hooks."""
        with self._hooks():
            return model(**inputs)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles: list[Any] = [self.head.register_forward_pre_hook(self._before)]
        if self.sends_probes:
            handles.append(self.head.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.calls += 1
        hidden = args[0] if args else None
        if self.calls > 1 or not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != len(self.mask):
            return None
        rows = hidden.flatten(0, 1).index_select(0, flat_indices(self.mask, hidden))
        linear = self.linear
        if self.sends_probes:
            ends = rows.detach()[[0, -1]]
            rows = torch.cat([ends * factor for factor in _PROBE_FACTORS])
        elif (
            linear is not None
            and self.targets is not None
            and self.transform is not None
            and _can_multiply(linear, rows)
        ):
            targets, transform = self.targets.to(rows.device), self.transform
            self.losses = linear_cross_entropy(
                rows, linear.weight, targets, linear.bias, transform.softcap, transform.scale
            )
            rows = rows[:0]  # the empty rows keep the output part of the graph; FSDP waits for its gradient
        self.rows, self.fits = len(rows), True
        return rows.unsqueeze(0), *args[1:]

    def _after(self, head: nn.Module, args: tuple[Any, ...], product: Any) -> None:
        if self.calls == 1 and isinstance(product, Tensor) and product.dim() == 3:
            self.product = product[0].detach()

    def result(self, output: Any) -> HeadResult | None:
        """Return losses or logits of the rows. None if the model did not use the rows as expected."""
        logits = output.logits
        if not self.fits or self.calls != 1 or logits.dim() != 3 or logits.shape[:2] != (1, self.rows):
            return None
        logits = logits[0]
        if self.losses is None:
            return HeadResult(logits=logits)
        return HeadResult(losses=self.losses + logits.sum().to(self.losses))


def plain_linear(head: nn.Module) -> nn.Linear | None:
    """Return the linear layer that alone computes the head's output. None if an adapter or a hook takes part."""
    inner: Any = head
    while isinstance(inner, AdapterLayer | SavedModule):
        if _has_hooks(inner) or (isinstance(inner, AdapterLayer) and inner.in_effect()):
            return None
        inner = inner.current() if isinstance(inner, SavedModule) else inner.base_layer
        if any(hook is not contiguous_input for hook in inner._forward_pre_hooks.values()):
            return None
    if type(inner) is not nn.Linear or _has_hooks(inner) or "forward" in vars(inner):
        return None
    return inner


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _can_multiply(linear: nn.Linear, rows: Tensor) -> bool:
    """Return True if the layer's forward is one product of these rows with a whole, unpacked weight."""
    parameters = [parameter for parameter in (linear.weight, linear.bias) if parameter is not None]
    cast = torch.is_autocast_enabled(rows.device.type)
    return linear.weight.shape == (linear.out_features, linear.in_features) and all(
        type(p) in (Tensor, nn.Parameter) and p.device == rows.device and (cast or p.dtype == rows.dtype)
        for p in parameters  # a shard or a packed weight has another class
    )
