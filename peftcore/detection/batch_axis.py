"""Whether a layer sees the rows of a batch first, or their tokens: (B, T, features) or (T, B, features).

No shape tells where B = T. PyTorch's attention says it by `batch_first`. transformers keeps rows first, but for models
that swap the first two axes in a `forward`, as XLNet and Longformer do, which their source shows.
"""

import inspect
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from peftcore.detection.module_tree import look_through

_SWAPS = ("transpose(0, 1)", "transpose(1, 0)", "permute(1, 0", "swapaxes(0, 1)")


def rows_come_first(model: nn.Module, path: str) -> bool | None:
    """Return whether the layer at `path` sees rows first; None where that cannot be told.

    The nearest module around the layer that has a `batch_first` decides.
    """
    around = [model]
    for name in path.split(".")[:-1]:
        child = look_through(around[-1])._modules.get(name)
        if child is None:
            break
        around.append(look_through(child))
    for module in reversed(around):
        attention = (
            module.self_attn if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) else module
        )
        if (said := vars(look_through(attention)).get("batch_first")) is not None:
            return bool(said)
    known = any(isinstance(module, PreTrainedModel) for module in around)
    return True if known and not any(_swaps(type(module)) for module in around) else None


@cache
def _swaps(kind: type[nn.Module]) -> bool:
    """Whether the source of the class's `forward` swaps the first two axes of something, or cannot be read."""
    for parent in kind.__mro__:
        if parent is not nn.Module and "forward" in vars(parent):
            try:
                source = inspect.getsource(vars(parent)["forward"])
            except (OSError, TypeError):
                return True
            if any(swap in source for swap in _SWAPS):
                return True
    return False
