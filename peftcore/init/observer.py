"""The interface of data-driven initialisations: they observe an adapter's layers while the base model runs."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from peftcore.methods.lora import Lora, LoraConfig


class Observer:
    """An initialisation that observes every forward pass of each layer, and then computes A (r, i) and B (o, r)."""

    title: ClassVar[str]
    needs_loss: ClassVar[bool] = False
    """True if the model has to compute a loss and its gradients."""
    subtracts_residual: ClassVar[bool] = False
    """True if s·BA is subtracted from the base weight, so that training starts at the base's own output."""
    adjusts_scaling: bool = False
    """True if a layer whose rank changes keeps its α, so that its scaling changes."""

    def __init__(self, config: LoraConfig, layers: Mapping[str, Lora]):
        self.config, self.layers = config, layers

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Prepare for a batch; called before the model runs it."""

    def hook(self, path: str) -> Callable[..., Any]:
        """Return a forward hook for the layer at `path`."""

        def observe(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return self.observe(path, inputs[0], output)

        return observe

    def observe(self, path: str, x: Tensor, y: Tensor) -> Tensor | None:
        """Observe a layer's input x (..., i) and output y (..., o); may return a tensor that replaces the output."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Return True if further batches would change nothing."""
        return False

    def ranks(self) -> dict[str, int]:
        """Return {path: rank (count)} that the data asks for."""
        return {path: adapter.r for path, adapter in self.layers.items()}

    def factors(self, path: str, adapter: Lora) -> tuple[Tensor, Tensor]:
        """Return A (r, i) and B (o, r) of one layer."""
        raise NotImplementedError
