"""Base class of the initialisations that need data: an observer sees the layers of an adapter while the base runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from peftcore.methods.lora.initialisation import Factors

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


class Observer:
    """Statistics of every layer of one adapter. Shapes: i in_features, o out_features, r rank.

    Args:
        config: The adapter's configuration.
        layers: {path: adapter of that layer}.
    """

    title: ClassVar[str]
    """Label of the progress bar."""
    needs_loss: ClassVar[bool] = False
    """True if the loss of every batch is computed and differentiated."""
    needs_original: ClassVar[bool] = False
    """True if the weights from before the base was quantised are needed."""
    keeps_alpha: bool = False
    """True if a layer whose rank changes keeps α, so that its scaling changes."""

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
        self.config, self.layers = config, layers

    original: Callable[[str], Tensor]
    """Function from a layer's path to its weight (o, i) from before the quantisation; set if `needs_original`."""

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Prepare for a batch (keyword arguments of the model) that runs next."""

    def hook(self, path: str) -> Callable[..., Any]:
        """Return a forward hook for the layer at `path`."""

        def forward_hook(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return self.observe(path, inputs[0], output)

        return forward_hook

    def observe(self, path: str, x: Tensor, y: Tensor) -> Tensor | None:
        """Record one call of one layer.

        Args:
            path: The layer's path.
            x: Input (..., i).
            y: Output (..., o).

        Returns:
            A tensor to use in place of the output; None leaves the output as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define observe")

    def is_done(self) -> bool:
        """Return True if further batches would change nothing."""
        return False

    def groups(self) -> list[list[str]]:
        """Return the paths of the layers that are observed together; each group takes one pass over all batches."""
        return [list(self.layers)]

    def finish(self, paths: Sequence[str]) -> None:
        """Reduce what was recorded of a group to its results, before the next group is observed."""

    def check(self) -> None:
        """Raise ConfigError if the data do not suffice; called after the last batch, before any adapter changes."""

    def ranks(self) -> dict[str, int]:
        """Return {path: rank} that the data suggest; 0 removes the adapter of that layer."""
        return {path: adapter.r for path, adapter in self.layers.items()}

    def factors(self, path: str, adapter: "Lora") -> Factors:
        """Return A (r, i) and B (o, r) for one layer."""
        raise NotImplementedError(f"{type(self).__name__} must define factors")
