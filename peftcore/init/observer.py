"""What the data-driven starts have in common: they watch the layers of an adapter while the base runs."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from peftcore.methods.lora import Lora, LoraConfig
from peftcore.methods.lora.starts import Factors


class Observer:
    """Sees each forward of each layer, and then gives every layer its factors A (r, i) and B (o, r)."""

    title: ClassVar[str]
    needs_loss: ClassVar[bool] = False
    taken_out: ClassVar[bool] = False
    """Whether s·BA leaves the base, so that training begins at the base's own output."""
    adjusts_scaling: bool = False
    """Whether a layer whose rank changes keeps its α, so that its scale changes."""

    def __init__(self, config: LoraConfig, layers: Mapping[str, Lora]):
        self.config, self.layers = config, layers

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch is about to run."""

    def hook(self, path: str) -> Callable[..., Any]:
        """A forward hook for the layer at `path`."""

        def watch(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return self.see(path, inputs[0], output)

        return watch

    def see(self, path: str, x: Tensor, y: Tensor) -> Tensor | None:
        """One forward of one layer: x (..., i), y (..., o); may give another output."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether further batches would change nothing."""
        return False

    def ranks(self) -> dict[str, int]:
        """{path: rank} that the data asks for."""
        return {path: adapter.r for path, adapter in self.layers.items()}

    def factors(self, path: str, adapter: Lora) -> Factors:
        """A and B for one layer."""
        raise NotImplementedError
