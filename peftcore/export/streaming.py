"""`merge_streaming`: merge an adapter into a model folder, from safetensors to safetensors, with little memory.

The model is made without weights; its parameters are the memory-mapped files, and the adapter is loaded onto it like
onto any model. So every mergeable method works, and the result equals `merge_and_unload` and `save_pretrained` bit for
bit. One merged weight is in memory at a time. The peak is the adapter plus a few float32 copies of the largest weight
(two for LoRA, more for a method that computes ΔW).

File formats: safetensors (https://github.com/huggingface/safetensors#format), and for shards the index file of
transformers (https://huggingface.co/docs/transformers/big_models).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peftcore.errors import ExportError
from peftcore.export.mapped_model import SCRATCH, STORAGES, dequantised_tensors, mapped_model
from peftcore.export.merged_tensors import Output, merged_tensors
from peftcore.export.safetensors_stream import Header, aligned, mapped_tensors, shards_of, write_index, write_shard
from peftcore.files import MANIFEST, damaged_files, directory_written_atomically, write_manifest
from peftcore.files.tensors import PICKLES
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
    """Write a transformers folder with an adapter merged into the base; tokenizer and other files are copied.

    Args:
        base_folder: the base model's transformers folder, with safetensors.
        adapter_directory: an adapter directory in PEFT's format, of any mergeable method.
        out_folder: where to write; an existing folder is replaced. A manifest is written too.
        max_shard_bytes: largest size of one file (bytes); a larger tensor gets a file of its own.
        dtype: "float32", "float16" or "bfloat16", rounded once after the merge; None: the base's type.
        storage: "nf4" or "fp4" for an adapter that was trained on the base in 4 bits. The adapter is then merged into
            the weights with which training computed: the base's, quantised and dequantised again. That needs disk space
            for a temporary copy of the linear layers.
        double_quant: the option of the same name in training.
        progressbar: True to show a progress bar.

    Returns:
        `out_folder`.

    Raises:
        ExportError: the base cannot be streamed, or the adapter replicates layers.
        CheckpointError: the adapter does not fit the base.
        MergeError: the adapter has no merged weight, or a merged weight is not finite. After every error nothing has
            been written.
    """
    base, out = Path(base_folder), Path(out_folder)
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)} or None; got {dtype!r}")
    if storage is not None and storage not in STORAGES:
        raise ExportError(f"storage must be one of {', '.join(STORAGES)} or None; got {storage!r}")
    if double_quant and storage is None:
        raise ExportError(
            "double_quant=True needs storage, the 4-bit type in training; give storage='nf4', or leave it out"
        )
    if damaged := damaged_files(base):
        raise ExportError(f"{base}: {', '.join(damaged)} does not match {MANIFEST}; take another copy")
    tensors = mapped_tensors(base)
    model = mapped_model(base, tensors)
    with directory_written_atomically(out) as fresh:
        if storage is not None:
            tensors = dequantised_tensors(model, tensors, storage, double_quant, fresh)
        adapters = load_adapter(model, Path(adapter_directory), _NAME, False, None).adapters
        if adapters.replication is not None:
            raise ExportError(
                f"layer_replication of {adapter_directory} adds layers that the base does not have; load the model and "
                "use merge_and_unload and save_pretrained"
            )
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
            write_shard(folder / name, own, _computed(outputs, own, bar))
    if len(shards) > 1:
        write_index(folder, shards, headers)


def _computed(outputs: Mapping[str, Output], keys: Mapping[str, Header], bar: Any) -> Iterator[Tensor]:
    for key, header in keys.items():
        yield outputs[key].compute()  # not assigned to a variable, which would keep a second tensor in memory
        bar.update(header.size)


def _copy_rest(base: Path, fresh: Path, untied: bool, dtype: str | None) -> None:
    """Copy every file that holds no weights, and update the configuration's `tie_word_embeddings` and `dtype`."""
    for file in base.iterdir():
        if (
            file.is_file()
            and file.suffix not in _WEIGHTS
            and not file.name.endswith(".index.json")
            and file.name != MANIFEST
        ):
            shutil.copyfile(file, fresh / file.name)
    for name in _folders(base):
        shutil.copytree(base / name, fresh / name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"tie_word_embeddings": False} if untied else {}
    config |= {"dtype": dtype} if dtype else {}
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _folders(base: Path) -> list[str]:
    """Return the folders that the model needs: further chat templates, and modules of sentence-transformers."""
    names = {"additional_chat_templates"}
    modules = base / "modules.json"
    if modules.is_file():
        names |= {module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))}
    inside = (entry.name for entry in base.iterdir() if entry.is_dir())
    return sorted(names.intersection(inside))
