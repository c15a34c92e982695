"""How GGUF names a model's weights, and in which order it keeps the rows of query and key.

Llama's rotary embedding turns a head's first half against its second in transformers, and even rows against odd ones
in llama.cpp. So a file for llama.cpp keeps each head's rows interleaved: row 2j + k of the file is row k·d/2 + j, d
rows a head. The families that llama.cpp turns by halves keep their rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
from torch import Tensor

from peftcore.errors import ExportError


class _Family(NamedTuple):
    """What transformers calls `model_type`."""

    architecture: gguf.MODEL_ARCH
    interleaved: bool = False
    """Whether the file keeps q's and k's rows interleaved."""
    has_own_head: bool = True
    """Whether llama.cpp takes an output head that is not the embeddings."""


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
"""Families whose files were compared with transformers, log-probability by log-probability, in llama.cpp."""

EMBEDDINGS, HEAD = "token_embd", "output"
_BY_ARCHITECTURE = {gguf.MODEL_ARCH_NAMES[family.architecture]: family for family in _FAMILIES.values()}


@dataclass(frozen=True)
class GgufLayout:
    """The layout of one model's file."""

    architecture: str
    """`general.architecture`."""
    query_heads: int
    key_heads: int
    tied: bool
    """Whether embeddings and output head share a weight, which the file then holds once."""
    interleaved: bool
    has_own_head: bool
    names: gguf.TensorNameMap

    def name(self, path: str) -> str:
        """GGUF's name, without `.weight`, of the layer at a module path; ExportError where it has none."""
        found = self.names.get_name(path)
        if found is None:
            raise ExportError(
                f"{path} has no name in this GGUF of {self.architecture}; give the adapter's own base, leave the layer "
                "out of the adapter, or merge the adapter and convert the whole model"
            )
        return found

    def to_file(self, name: str, rows: Tensor) -> Tensor:
        """Rows (o, ...) of a weight, of B or of a bias, in the file's order."""
        heads = self._heads(name)
        return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def from_file(self, name: str, rows: Tensor) -> Tensor:
        """Rows of the file in the model's order."""
        heads = self._heads(name)
        return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _heads(self, name: str) -> int | None:
        if not self.interleaved:
            return None
        return {"attn_q": self.query_heads, "attn_k": self.key_heads}.get(name.rpartition(".")[2])


def layout_of(config: Any) -> GgufLayout:
    """Of a transformers configuration; ExportError names the families that fit when this one does not."""
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"a GGUF of a {config.model_type!r} model is not known here; known: {', '.join(sorted(_FAMILIES))}. Merge "
            "the adapter, save the model and convert it with llama.cpp's convert_hf_to_gguf.py"
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
    """Of a GGUF model; ExportError as `layout_of`."""
    architecture = _value(reader, "general.architecture")
    family = _BY_ARCHITECTURE.get(architecture)
    if family is None:
        raise ExportError(
            f"a GGUF of architecture {architecture!r} is not known here; known: {', '.join(sorted(_BY_ARCHITECTURE))}"
        )
    heads = _value(reader, f"{architecture}.attention.head_count")
    keys = _value(reader, f"{architecture}.attention.head_count_kv") or heads
    tied = all(tensor.name != f"{HEAD}.weight" for tensor in reader.tensors)
    return _layout(family, _value(reader, f"{architecture}.block_count"), heads, keys, tied)


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


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
