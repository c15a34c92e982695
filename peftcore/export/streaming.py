"""An adapter merged into a model folder, from safetensors to safetensors, without the model in memory.

The model's structure is made without weights, and its parameters are then the files themselves, mapped into memory;
the adapter is loaded onto that like onto any model. So every method that merges does so here, and what is written has
the bits of `merge_and_unload` and `save_pretrained`. One merged weight is in memory at a time: the peak is the adapter
and the largest weight a few times over in float32 (twice for LoRA; more where a method builds ΔW).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peftcore._util.tensors import PICKLES
from peftcore.export.errors import ExportError
from peftcore.export.four_bit import SCRATCH, STORAGES, dequantised_tensors
from peftcore.export.mapped_model import mapped_model
from peftcore.export.merged_tensors import Output, merged_tensors
from peftcore.export.safetensors_stream import Header, aligned, mapped_tensors, shards_of, write_index, write_shard
from peftcore.files import MANIFEST, damaged_files, directory_written_atomically, write_manifest
from peftcore.injection.merge import check_mergeable
from peftcore.storage.checkpoint import load_adapter

_WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"} | PICKLES
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAME = "default"
SHARD_BYTES = 5_000_000_000


def merge_streaming(
    base_folder: str | Path,
    adapter_directory: str | Path,
    out_folder: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    dtype: str | None = None,
    storage: str | None = None,
    double_quant: bool = False,
    progressbar: bool = False,
) -> Path:
    """Write a transformers folder with an adapter merged into it; gives `out_folder`, which is replaced whole.

    max_shard_bytes: of one file, at most; a larger tensor has one of its own. dtype: "float32", "float16" or
    "bfloat16", rounded to once, after the merge; None: what the base has. Tokenizer, templates and generation
    settings are copied, a manifest is written.
    storage: "nf4" or "fp4" for an adapter that was trained on the base in 4 bits: it is then merged into what training
    saw, the base quantised and dequantised again (a copy of its linear layers on the disk for as long as this runs).
    double_quant: as in training.
    Raises ExportError for a base that cannot be streamed, CheckpointError for an adapter that does not fit it,
    MergeError for one that has no merged weight or whose merged weight is not finite; nothing is then written.
    """
    base, out = Path(base_folder), Path(out_folder)
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)} or None; got {dtype!r}")
    if storage is not None and storage not in STORAGES:
        raise ExportError(f"storage must be one of {', '.join(STORAGES)} or None; got {storage!r}")
    if damaged := damaged_files(base):
        raise ExportError(f"{base}: {', '.join(damaged)} does not match {MANIFEST}; take another copy")
    tensors = mapped_tensors(base)
    model = mapped_model(base, tensors)
    with directory_written_atomically(out) as fresh:
        if storage is not None:
            tensors = dequantised_tensors(model, tensors, storage, double_quant, fresh)
        adapters = load_adapter(model, Path(adapter_directory), _NAME, False, None)
        check_mergeable(model, [_NAME])
        outputs = merged_tensors(model, adapters, _NAME, tensors, DTYPES.get(dtype or ""))
        _write(fresh, outputs, max_shard_bytes, progressbar)
        _copy_rest(base, fresh, untied=bool(outputs.keys() - tensors.keys()), dtype=dtype)
        (fresh / SCRATCH).unlink(missing_ok=True)
        write_manifest(fresh)
    return out


@torch.no_grad()
def _write(folder: Path, outputs: Mapping[str, Output], max_shard_bytes: int, progressbar: bool) -> None:
    headers = {key: output.header for key, output in outputs.items()}
    shards = shards_of(headers, max_shard_bytes)
    total = sum(header.size for header in headers.values())
    with tqdm(total=total, desc="merge", unit="B", unit_scale=True, disable=not progressbar) as bar:
        for name, keys in shards.items():
            own = dict(aligned({key: headers[key] for key in keys}))
            write_shard(folder / name, own, _made(outputs, own, bar))
    if len(shards) > 1:
        write_index(folder, shards, headers)


def _made(outputs: Mapping[str, Output], keys: Mapping[str, Header], bar: Any) -> Iterator[Tensor]:
    for key, header in keys.items():
        yield outputs[key].make()  # kept by no name here, or two would be in memory
        bar.update(header.size)


def _copy_rest(base: Path, fresh: Path, untied: bool, dtype: str | None) -> None:
    """Everything of the folder that is no weight, the configuration with what is no longer true set right."""
    for file in base.iterdir():
        if (
            file.is_file()
            and file.suffix not in _WEIGHTS
            and not file.name.endswith(".index.json")
            and file.name != MANIFEST
        ):
            shutil.copyfile(file, fresh / file.name)
    config = json.loads((base / "config.json").read_text())
    config |= {"tie_word_embeddings": False} if untied else {}
    config |= {"dtype": dtype} if dtype else {}
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
