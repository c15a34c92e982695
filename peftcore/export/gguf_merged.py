"""`export_gguf_merged`: a GGUF model with an adapter merged into the base.

The base is a GGUF file, whose metadata and tokenizer are copied, or a transformers folder. One weight after another is
dequantised, brought to the model's orientation and order of rows, merged, brought back and written. So the peak of
memory is a few copies of one weight in float32. If the base file is quantised, the adapter is merged into dequantised
weights.

File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
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
from peftcore.files import file_written_atomically
from peftcore.gguf_files.layout import EMBEDDINGS, HEAD, GgufLayout, layout_of
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.merge import check_mergeable

F32 = gguf.GGMLQuantizationType.F32
DTYPES = {
    "float32": (F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_FLOAT32 = ("position_embd.weight",)
"""Matrices that llama.cpp's converter writes in float32, like vectors."""

Merge = Callable[[Tensor], Tensor]
"""A function from a weight (in canonical orientation) or bias of the model, in float32, to the merged one."""


class _Change(NamedTuple):
    """The merge of one tensor."""

    merge: Merge
    shape: tuple[int, ...]
    """Expected shape in the file."""


class _OutputTensor(NamedTuple):
    """One tensor of the new file."""

    name: str
    source: BaseTensor
    """The base's tensor."""
    change: _Change | None


def export_gguf_merged(
    base: str | Path,
    source: nn.Module | str | Path,
    file: str | Path,
    adapter_name: str = "default",
    dtype: str = "float16",
) -> Path:
    """Write a GGUF model with an adapter merged into the base.

    Args:
        base: the base's GGUF file, or its transformers folder for a family of `gguf_folder.FAMILIES`.
        source: a model with an adapter of any mergeable method, or a directory of LoRA or AdaLoRA.
        file: where to write.
        adapter_name: the model's adapter; ignored for a directory.
        dtype: type of matrices, "float32", "float16" or "bfloat16"; vectors are float32.

    Returns:
        The path of the file.

    Raises:
        ExportError: a GGUF file cannot hold the result.
        MergeError: the adapter has no merged weight. After every error nothing has been written.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    origin = gguf_base(base)
    layout = origin.layout
    if isinstance(source, nn.Module):
        merges = _merges_of_model(source, adapter_name, layout)
    else:
        merges = _merges_of_directory(source, layout)
    outputs = _output_tensors(origin, merges)
    matrix_type, file_type = DTYPES[dtype]
    types = {t.name: F32 if len(t.source.shape) == 1 or t.name in _FLOAT32 else matrix_type for t in outputs}
    with (
        torch.no_grad(),
        file_written_atomically(Path(file)) as fresh,
        closing(gguf.GGUFWriter(fresh, layout.architecture)) as writer,
    ):
        origin.write_keys(writer)
        writer.add_file_type(file_type)
        for output in outputs:
            _write_header(writer, output, types[output.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for output in outputs:
            writer.write_tensor_data(_values(output, layout, types[output.name]))
    return Path(file)


def _merges_of_model(model: nn.Module, adapter_name: str, layout: GgufLayout) -> dict[str, _Change]:
    """Return {tensor name: merge}."""
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    if adapters.replaced_rows:
        raise ExportError(
            "the adapter's directory holds embeddings of the base that differ from the base's own; use "
            "merge_and_unload and save_pretrained, and export the saved model by llama.cpp's convert_hf_to_gguf.py"
        )
    if adapters.replication is not None:
        raise ExportError(
            f"layer_replication of adapter {adapters.replication[0]!r} adds layers that the base does not have; use "
            "merge_and_unload and save_pretrained, and export the saved model by llama.cpp's convert_hf_to_gguf.py"
        )
    config: Any = getattr(model, "config", None)
    if layout_of(config).architecture != layout.architecture:
        raise ExportError(
            f"the model is a {config.model_type}, the base a {layout.architecture}; give the model's own base"
        )
    check_mergeable(model, [adapter_name])
    if adapters.copies(adapter_name) or adapters.biases(adapter_name):
        raise ExportError(
            "the adapter holds trained modules or biases; use merge_and_unload, save_pretrained and llama.cpp's "
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


def _output_tensors(origin: GgufBase, merges: dict[str, _Change]) -> list[_OutputTensor]:
    """List the tensors of the new file, in order; tied embeddings become two tensors if the adapter changes one end."""
    left, head, embeddings, layout = dict(merges), f"{HEAD}.weight", f"{EMBEDDINGS}.weight", origin.layout
    outputs = [_OutputTensor(tensor.name, tensor, left.pop(tensor.name, None)) for tensor in origin.tensors]
    if layout.tied and (head in left or embeddings in merges):
        if not layout.has_own_head:
            raise ExportError(
                f"the adapter changes embeddings or output head, and llama.cpp's {layout.architecture} has one weight "
                "for both; train the adapter without that layer"
            )
        source = next(tensor for tensor in origin.tensors if tensor.name == embeddings)
        outputs.append(_OutputTensor(head, source, left.pop(head, None)))
    if left:
        raise ExportError(f"{origin.label} has no {', '.join(sorted(left)[:3])}; give the adapter's own base")
    for name, source, change in outputs:
        if change is not None and change.shape != source.shape:
            raise ExportError(
                f"{name} is {list(source.shape)} in {origin.label}, and the adapter is for {list(change.shape)}; give "
                "the adapter's own base"
            )
    return outputs


def _write_header(writer: gguf.GGUFWriter, output: _OutputTensor, kind: gguf.GGMLQuantizationType) -> None:
    shape = output.source.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    # with `raw_dtype` the writer expects bytes, and a shape that counts bytes
    byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(output.name, byte_shape, np.dtype(np.uint8), count, raw_dtype=kind)


def _values(output: _OutputTensor, layout: GgufLayout, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the tensor's values in the file's type."""
    values = output.source.values()
    if output.change is not None:
        merged = _merged(output.name, torch.from_numpy(np.array(values, np.float32)), output.change.merge, layout)
        values = merged.float().contiguous().numpy()
    with np.errstate(over="ignore"):
        data = quantize(np.ascontiguousarray(values, np.float32), kind)
    if output.change is not None and not np.isfinite(dequantize(data, kind)).all():
        raise ExportError(
            f"the merged {output.name} has NaN or infinite values in {kind.name}; check the adapter, or use float32"
        )
    return data


def _merged(name: str, rows: Tensor, merge: Merge, layout: GgufLayout) -> Tensor:
    layer = name.rpartition(".")[0]
    if layer == EMBEDDINGS:
        return merge(rows.T).T
    return layout.to_file(layer, merge(layout.from_file(layer, rows)))
