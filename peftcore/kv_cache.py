"""Key/value cache of a decoder in reserved memory.

transformers' `DynamicCache` copies all keys and values in each decoding step. With 32 rows of 150 tokens that was a
quarter of a step (SmolLM2-135M in bfloat16, 2 cores of an AMD EPYC with AVX-512).

Shapes: B rows, h heads, S tokens in the cache, T tokens of the step, d width of a head.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens (count) by which a layer's memory grows at a time."""


class GrowingLayer(DynamicLayer):
    """Cache of one layer with reserved memory, so that a step writes only its own keys and values.

    It is for generation, without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, h, T, d), and return all of them (B, h, S + T, d)."""
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._memory is None or self._memory[0].shape[-2] < end or not self._is_shown():
            self._grow(key_states, value_states, length, end + ROOM)
        assert self._memory is not None
        self._memory[0][:, :, length:end] = key_states
        self._memory[1][:, :, length:end] = value_states
        self._show(end)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def filled(self, parts: Sequence[tuple[Tensor, Tensor]], length: int) -> "GrowingLayer":
        """Copy the rows of other layers, aligned at the right end of `length` tokens, and return this layer."""
        rows = sum(len(keys) for keys, _ in parts)
        reserved, first = self._reserve(rows, *parts[0], length + ROOM), 0
        for part in parts:
            for memory, tensor in zip(reserved, part, strict=True):
                memory[first : first + len(tensor), :, length - tensor.shape[2] : length] = tensor
            first += len(part[0])
        self._show(length)
        return self

    def shorten(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        if self._memory is not None:
            self._show(length)

    def _is_shown(self) -> bool:
        """Return True if `keys` is in the memory; a method of `DynamicLayer` that selects rows replaces it."""
        assert self._memory is not None
        memory, keys = self._memory[0], self.keys
        return keys is not None and (keys.data_ptr(), len(keys)) == (memory.data_ptr(), len(memory))

    def _grow(self, keys: Tensor, values: Tensor, length: int, room: int) -> None:
        """Reserve memory for `room` tokens of such keys and values, and copy the present `length` tokens there."""
        old = self.keys, self.values
        for memory, tensor in zip(self._reserve(len(keys), keys, values, room), old, strict=True):
            if length:
                assert tensor is not None
                memory[:, :, :length] = tensor

    def _reserve(self, rows: int, keys: Tensor, values: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Reserve memory for some rows with `room` tokens of such keys and values, and return it."""
        keys, values = (one.new_zeros(rows, one.shape[1], room, one.shape[3]) for one in (keys, values))
        self._memory = keys, values
        return self._memory

    def _show(self, length: int) -> None:
        assert self._memory is not None
        self.keys, self.values = (memory[:, :, :length] for memory in self._memory)
        self.is_initialized = True


def growing_cache(layers: Sequence[GrowingLayer] = ()) -> Cache:
    """Return a cache of attention layers, for `model.generate(..., cache=growing_cache())`.

    Layers with a sliding window keep all tokens, too; the model masks what the window hides.

    Args:
        layers: The first layers' keys and values, if there are any; further layers are added as the model needs them.
    """
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    cache.layers.extend(layers)
    return cache
