"""GGUF's tensor names, and its order of the rows of query and key.

Rotary embeddings rotate pairs of rows of a head. In transformers a pair is a row of the head's first half and one of
its second half. In llama.cpp's Llama architecture a pair is an even row and the next odd row. So a Llama file
interleaves the rows of each head: row 2j + k of the file is row k·d/2 + j of the model, with d rows per head.
Architectures in which llama.cpp pairs the halves keep the order of the model.

Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
from torch import Tensor

from peftcore.errors import ExportError


class _Family(NamedTuple):
    """GGUF properties of a model family, transformers' `model_type`."""

    architecture: gguf.MODEL_ARCH
    interleaved: bool = False
    """True if the file interleaves the rows of query and key."""
    has_own_head: bool = True
    """True if llama.cpp supports an output head that is not tied to the embeddings."""


_FAMILIES = {
    "gemma": _Family(gguf.MODEL_ARCH.GEMMA, has_own_head=False),
    "gemma2": _Family(gguf.MODEL_ARCH.GEMMA2, has_own_head=False),
    "gpt2": _Family(gguf.MODEL_ARCH.GPT2),
    "llama": _Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": _Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "phi3": _Family(gguf.MODEL_ARCH.PHI3),
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Family(gguf.MODEL_ARCH.QWEN3),
}
"""Families whose exported files were tested: llama.cpp gives the same log-probabilities as transformers."""

EMBEDDINGS, HEAD = "token_embd", "output"
_BY_ARCHITECTURE = {gguf.MODEL_ARCH_NAMES[family.architecture]: family for family in _FAMILIES.values()}


@dataclass(frozen=True)
class GgufLayout:
    """Tensor names and order of rows of one model's GGUF file."""

    architecture: str
    """`general.architecture`."""
    query_heads: int
    key_heads: int
    tied: bool
    """True if embeddings and output head share a weight, which the file then holds once."""
    interleaved: bool
    has_own_head: bool
    names: gguf.TensorNameMap

    def name(self, path: str) -> str:
        """Return the GGUF name, without `.weight`, of the layer at a module path; ExportError if it has none."""
        name = self.names.get_name(path)
        if name is None:
            raise ExportError(
                f"{path} has no GGUF name in a {self.architecture} model; give the adapter's own base, train the "
                "adapter without this layer, or merge it and convert the whole model"
            )
        return name

    def to_file(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows (o, ...) of a weight, of B or of a bias in the file's order."""
        heads = self._heads(name)
        return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def from_file(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of the file in the model's order."""
        heads = self._heads(name)
        return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _heads(self, name: str) -> int | None:
        if not self.interleaved:
            return None
        return {"attn_q": self.query_heads, "attn_k": self.key_heads}.get(name.rpartition(".")[2])


def layout_of(config: Any) -> GgufLayout:
    """Return the layout for a transformers configuration; ExportError if its family is not supported."""
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"a {config.model_type!r} model cannot be exported as GGUF; supported: {', '.join(sorted(_FAMILIES))}; "
            "merge the adapter, save the model and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    heads = config.num_attention_heads
    return _layout(
        family,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        bool(getattr(config, "tie_word_embeddings", False)),
    )


def layout_of_file(reader: gguf.GGUFReader) -> GgufLayout:
    """Return the layout of a GGUF model; ExportError if its architecture is not supported."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    return layout_of_metadata(value, [tensor.name for tensor in reader.tensors])


def layout_of_metadata(value: Callable[[str], Any], tensors: Collection[str]) -> GgufLayout:
    """Return the layout of a GGUF model.

    Args:
        value: Returns the value of a metadata key, or None.
        tensors: The names of the file's tensors.

    Raises:
        ExportError: The architecture is not supported, or a size is missing.
    """
    architecture = value("general.architecture")
    family = _BY_ARCHITECTURE.get(architecture)
    if family is None:
        raise ExportError(
            f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(sorted(_BY_ARCHITECTURE))}; "
            "for another one, save the model by save_pretrained and use llama.cpp's convert_hf_to_gguf.py"
        )
    heads = value(f"{architecture}.attention.head_count")
    keys = value(f"{architecture}.attention.head_count_kv") or heads
    blocks = value(f"{architecture}.block_count")
    for name, number in (("head_count", heads), ("head_count_kv", keys), ("block_count", blocks)):
        if not isinstance(number, int) or number < 1:
            raise ExportError(
                f"{name} of this {architecture} file is {number!r}, and must be one positive number; give another file"
            )
    return _layout(family, blocks, heads, keys, f"{HEAD}.weight" not in tensors)


def _layout(family: _Family, blocks: int, query_heads: int, key_heads: int, tied: bool) -> GgufLayout:
    return GgufLayout(
        architecture=gguf.MODEL_ARCH_NAMES[family.architecture],
        query_heads=query_heads,
        key_heads=key_heads,
        tied=tied,
        interleaved=family.interleaved,
        has_own_head=family.has_own_head,
        names=gguf.get_tensor_name_map(family.architecture, blocks),
    )
