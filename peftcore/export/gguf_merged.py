"""An adapter merged into a base that is a GGUF file: the same file with other weights.

Key/values and tokenizer are copied. Each weight is dequantised, put into the model's orientation and order of rows,
merged, put back and written, one after another, so that the peak is one weight in float32 a few times over. What the
adapter is merged into are the dequantised weights, whatever the file held.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from peftcore.adapter_set import adapter_set
from peftcore.export.canonical import canonicalise
from peftcore.export.errors import ExportError
from peftcore.export.gguf_layout import EMBEDDINGS, HEAD, GgufLayout, layout_of, layout_of_file
from peftcore.export.whole_file import written_whole
from peftcore.merge import check_mergeable

F32 = gguf.GGMLQuantizationType.F32
DTYPES = {
    "float32": (F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_NOT_COPIED = ("general.architecture", "general.file_type", "general.quantization_version")
"""Keys that are written anew, or not true of the new file."""
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
    source: Any
    """That of the old one."""
    change: _Change | None


def export_gguf_merged(
    base_gguf: str | Path,
    source: nn.Module | str | Path,
    file: str | Path,
    adapter_name: str = "default",
    dtype: str = "float16",
) -> Path:
    """Write a GGUF model with an adapter merged into it; gives the file's path.

    source: a model with an adapter of any mergeable method, or a directory of LoRA or AdaLoRA.
    dtype: of matrices, "float32", "float16" or "bfloat16"; vectors are float32.
    Raises ExportError for what the file cannot hold, MergeError for what has no merged weight; nothing is then written.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    reader = gguf.GGUFReader(base_gguf)
    layout = layout_of_file(reader)
    if isinstance(source, nn.Module):
        merges = _merges_of_model(source, adapter_name, layout)
    else:
        merges = _merges_of_directory(source, layout)
    places = _places(reader, layout, merges)
    wanted, file_type = DTYPES[dtype]
    types = {p.name: F32 if p.source.shape.size == 1 or p.name in _FLOAT32 else wanted for p in places}
    with (
        torch.no_grad(),
        written_whole(Path(file)) as fresh,
        closing(gguf.GGUFWriter(fresh, layout.architecture)) as writer,
    ):
        _copy_keys(reader, writer)
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


def _places(reader: gguf.GGUFReader, layout: GgufLayout, merges: dict[str, _Change]) -> list[_Place]:
    """The tensors of the new file, in order. Embeddings that are also the head become two if only one is changed."""
    left, head, embeddings = dict(merges), f"{HEAD}.weight", f"{EMBEDDINGS}.weight"
    places = [_Place(tensor.name, tensor, left.pop(tensor.name, None)) for tensor in reader.tensors]
    if layout.tied and (head in left or embeddings in merges):
        if not layout.has_own_head:
            raise ExportError(
                f"the adapter changes one of embeddings and head, and llama.cpp's {layout.architecture} has one weight "
                "for both; leave that layer out of the adapter"
            )
        source = next(tensor for tensor in reader.tensors if tensor.name == embeddings)
        places.append(_Place(head, source, left.pop(head, None)))
    if left:
        raise ExportError(f"the file has no {', '.join(sorted(left)[:3])}; give the GGUF of the adapter's own base")
    for name, source, change in places:
        if change is not None and change.shape != _shape(source):
            raise ExportError(
                f"{name} is {list(_shape(source))} in the file, and the adapter is for {list(change.shape)}; give the "
                "GGUF of the adapter's own base"
            )
    return places


def _shape(tensor: Any) -> tuple[int, ...]:
    """A tensor's shape as torch and numpy say it; GGUF says it the other way round."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _copy_keys(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in _fields(reader):
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def _fields(reader: gguf.GGUFReader) -> Iterator[gguf.ReaderField]:
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in _NOT_COPIED and field.types:
            yield field


def _announce(writer: gguf.GGUFWriter, place: _Place, kind: gguf.GGMLQuantizationType) -> None:
    shape = _shape(place.source)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    # a raw type stands for bytes, so the shape it goes with counts them
    held = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(place.name, held, np.dtype(np.uint8), count, raw_dtype=kind)


def _written(place: _Place, layout: GgufLayout, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The tensor's values as the file holds them."""
    values = dequantize(place.source.data, place.source.tensor_type)
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
