"""`peft.tuners._buffer_dict`: a dictionary of buffers."""

from collections import OrderedDict
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from torch import Tensor, nn

__all__ = ["BufferDict"]


class BufferDict(nn.Module):
    """A dictionary of buffers, as `nn.ParameterDict` is one of parameters.

    Args:
        buffers: {name: tensor}, or pairs.
        persistent: True if `state_dict` holds the buffers.
    """

    _buffers: dict[str, Tensor]  # type: ignore[assignment]

    def __init__(self, buffers: Mapping[str, Tensor] | Iterable[Any] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Remove all buffers."""
        for key in list(self):
            del self[key]

    def pop(self, key: str) -> Tensor:
        """Remove a buffer, and return it."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Tensor]:
        """Return the pairs of name and buffer."""
        return self._buffers.items()

    def values(self) -> ValuesView[Tensor]:
        """Return the buffers."""
        return self._buffers.values()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[Any]) -> None:
        """Add buffers, in place of those of the same names.

        Args:
            buffers: {name: tensor}, which is sorted by name unless it is an OrderedDict or a BufferDict; or pairs.

        Raises:
            TypeError: `buffers` is neither a mapping nor pairs.
            ValueError: an element is no pair.
        """
        pairs: Iterable[Any] = buffers.items() if isinstance(buffers, Mapping | BufferDict) else buffers
        is_sorted = isinstance(buffers, Mapping) and not isinstance(buffers, OrderedDict)
        for key, buffer in sorted(pairs, key=lambda pair: pair[0]) if is_sorted else pairs:
            self[key] = buffer

    def extra_repr(self) -> str:
        """Return one line for each buffer."""
        shapes = {key: "x".join(str(size) for size in buffer.shape) for key, buffer in self.items()}
        return "\n".join(f"  ({key}): Buffer of size {shape}" for key, shape in shapes.items())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a BufferDict cannot be called; take a buffer by its name")
