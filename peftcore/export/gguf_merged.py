"""An adapter merged into its base, as a GGUF model: of the base's own GGUF file, or of its transformers folder.

Of a file, key/values and tokenizer are copied. Each weight is dequantised, put into the model's orientation and order
of rows, merged, put back and written, one after another, so that the peak is one weight in float32 a few times over.
What the adapter is merged into are the dequantised weights, whatever the file held.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from peftcore.errors import ExportError
from peftcore.export.canonical import canonicalise
from peftcore.export.gguf_base import BaseTensor, GgufBase, gguf_base
from peftcore.export.gguf_layout import EMBEDDINGS, HEAD, GgufLayout, layout_of
from peftcore.files import file_written_atomically
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.merge import check_mergeable

F32 = gguf.GGMLQuantizationType.F32
DTYPES = {
    "float32": (F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_FLOAT32 = ("position_embd.weight",)
"""Matrices that llama.cpp's converter keeps in float32, as it does vectors."""

Merge = Callable[[Tensor], Tensor]
"""From a weight (canonical) or bias of the model, in float32, to the merged one."""


class _Change(NamedTuple):
    """What an adapter does to one tensor."""

    merge: Merge
    shape: tuple[int, ...]
    """As the file should hold it."""


class _Place(NamedTuple):
    """One tensor of the new file."""

    name: str
    source: BaseTensor
    """That of the base."""
    change: _Change | None


def export_gguf_merged(
    base: str | Path,
    source: nn.Module | str | Path,
    file: str | Path,
    adapter_name: str = "default",
    dtype: str = "float16",
) -> Path:
    """Write a GGUF model with an adapter merged into it; gives the file's path.

    base: the base's own GGUF file; or its transformers folder, of one of the families of `gguf_folder`.
    source: a model with an adapter of any mergeable method, or a directory of LoRA or AdaLoRA.
    dtype: of matrices, "float32", "float16" or "bfloat16"; vectors are float32.
    Raises ExportError for what the file cannot hold, MergeError for what has no merged weight; nothing is then written.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    origin = gguf_base(base)
    layout = origin.layout
    if isinstance(source, nn.Module):
        merges = _merges_of_model(source, adapter_name, layout)
    else:
        merges = _merges_of_directory(source, layout)
    places = _places(origin, merges)
    wanted, file_type = DTYPES[dtype]
    types = {p.name: F32 if len(p.source.shape) == 1 or p.name in _FLOAT32 else wanted for p in places}
    with (
        torch.no_grad(),
        file_written_atomically(Path(file)) as fresh,
        closing(gguf.GGUFWriter(fresh, layout.architecture)) as writer,
    ):
        origin.write_keys(writer)
        writer.add_file_type(file_type)
        for place in places:
            _announce(writer, place, types[place.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place in places:
            writer.write_tensor_data(_written(place, layout, types[place.name]))
    return Path(file)


def _merges_of_model(model: nn.Module, adapter_name: str, layout: GgufLayout) -> dict[str, _Change]:
    """{tensor's name: merge}"""
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    if adapters.replaced_rows:
        raise ExportError(
            "the adapter's directory brought embeddings of the base that differ from the base's own; use "
            "merge_and_unload, save_pretrained and export_gguf_merged or convert_hf_to_gguf.py for what is saved"
        )
    config: Any = getattr(model, "config", None)
    if layout_of(config).architecture != layout.architecture:
        raise ExportError(f"the model is a {config.model_type}, the file a {layout.architecture}; give the model's own")
    check_mergeable(model, [adapter_name])
    if adapters.copies(adapter_name) or adapters.biases(adapter_name):
        raise ExportError(
            "the adapter holds whole modules or biases; use merge_and_unload, save_pretrained and llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    merges: dict[str, _Change] = {}
    for path, adapter in adapters.adapters(adapter_name).items():
        if adapter.base.kind not in ("linear", "embedding"):
            raise ExportError(
                f"{path} is a {adapter.base.kind}; use merge_and_unload, save_pretrained and llama.cpp's "
                "convert_hf_to_gguf.py"
            )
        name = layout.name(path)
        base, (o, i) = adapter.base, (adapter.base.out_features, adapter.base.in_features)
        merges[f"{name}.weight"] = _Change(adapter.merged_weight, (o, i) if base.kind == "linear" else (i, o))
        if (bias := base.unmerged_bias) is not None and adapter.merged_bias(bias) is not bias:
            merges[f"{name}.bias"] = _Change(adapter.merged_bias, (o,))  # type: ignore[arg-type]
    return merges


def _merges_of_directory(directory: str | Path, layout: GgufLayout) -> dict[str, _Change]:
    lora = canonicalise(directory)
    merges = {}
    for path, (a, b) in lora.layers.items():
        shape = (a.shape[1], len(b)) if path in lora.embeddings else (len(b), a.shape[1])
        merges[f"{layout.name(path)}.weight"] = _Change(lambda weight, a=a, b=b: torch.addmm(weight, b, a), shape)
    return merges


def _places(origin: GgufBase, merges: dict[str, _Change]) -> list[_Place]:
    """The tensors of the new file, in order. Embeddings that are also the head become two if only one is changed."""
    left, head, embeddings, layout = dict(merges), f"{HEAD}.weight", f"{EMBEDDINGS}.weight", origin.layout
    places = [_Place(tensor.name, tensor, left.pop(tensor.name, None)) for tensor in origin.tensors]
    if layout.tied and (head in left or embeddings in merges):
        if not layout.has_own_head:
            raise ExportError(
                f"the adapter changes one of embeddings and head, and llama.cpp's {layout.architecture} has one weight "
                "for both; leave that layer out of the adapter"
            )
        source = next(tensor for tensor in origin.tensors if tensor.name == embeddings)
        places.append(_Place(head, source, left.pop(head, None)))
    if left:
        raise ExportError(f"{origin.what} has no {', '.join(sorted(left)[:3])}; give the adapter's own base")
    for name, source, change in places:
        if change is not None and change.shape != source.shape:
            raise ExportError(
                f"{name} is {list(source.shape)} in {origin.what}, and the adapter is for {list(change.shape)}; give "
                "the adapter's own base"
            )
    return places


def _announce(writer: gguf.GGUFWriter, place: _Place, kind: gguf.GGMLQuantizationType) -> None:
    shape = place.source.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    # a raw type stands for bytes, so the shape it goes with counts them
    held = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(place.name, held, np.dtype(np.uint8), count, raw_dtype=kind)


def _written(place: _Place, layout: GgufLayout, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The tensor's values as the file holds them."""
    values = place.source.values()
    if place.change is not None:
        merged = _merged(place.name, torch.from_numpy(np.array(values, np.float32)), place.change.merge, layout)
        values = merged.float().contiguous().numpy()
    with np.errstate(over="ignore"):
        data = quantize(np.ascontiguousarray(values, np.float32), kind)
    if place.change is not None and not np.isfinite(dequantize(data, kind)).all():
        raise ExportError(f"{place.name}, merged, is NaN or infinite in {kind.name}; check the adapter, or use float32")
    return data


def _merged(name: str, rows: Tensor, merge: Merge, layout: GgufLayout) -> Tensor:
    layer = name.rpartition(".")[0]
    if layer == EMBEDDINGS:
        return merge(rows.T).T
    return layout.to_file(layer, merge(layout.from_file(layer, rows)))
