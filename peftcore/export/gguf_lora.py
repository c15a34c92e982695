"""`export_gguf_lora`: a LoRA as a GGUF file, which llama.cpp applies to its own copy of the base model.

The file has the metadata of an adapter (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, `general.type`), and
tensors as llama.cpp's convert_lora_to_gguf.py writes them (https://github.com/ggml-org/llama.cpp):
`<name>.weight.lora_a` (r, i) and `<name>.weight.lora_b` (o, r), and for `token_embd` lora_a (v, r). llama.cpp scales by
α/r, or by 1 if α is 0. Since B contains the scaling, α is 0.

Shapes: i in_features, o out_features, r rank, v vocabulary.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor, nn

from peftcore.errors import ExportError
from peftcore.export.canonical import CanonicalLora, canonicalise
from peftcore.files import file_written_atomically
from peftcore.gguf_files.layout import EMBEDDINGS, HEAD, GgufLayout, layout_of

DTYPES = {"float32": np.float32, "float16": np.float16}


def export_gguf_lora(
    source: nn.Module | str | Path,
    adapter_name: str,
    file: str | Path,
    base: str | Path | None = None,
    dtype: str = "float32",
) -> Path:
    """Write an adapter as a GGUF LoRA file, for `llama-cli -m base.gguf --lora file`.

    Args:
        source: a model with a LoRA, AdaLoRA or VeRA adapter, or a directory of LoRA or AdaLoRA.
        adapter_name: the model's adapter; ignored for a directory.
        file: where to write.
        base: transformers folder of the base model of a directory; None: the directory's `base_model_name_or_path`.
        dtype: "float32" or "float16".

    Returns:
        The path of the file.

    Raises:
        ExportError: llama.cpp does not support the adapter, a layer or the architecture; nothing has been written.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    lora = canonicalise(source, adapter_name)
    layout = layout_of(model_config(source, base, lora))
    tensors = _tensors(lora, layout)
    with file_written_atomically(Path(file)) as fresh, closing(gguf.GGUFWriter(fresh, layout.architecture)) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.contiguous().numpy().astype(DTYPES[dtype]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return Path(file)


def model_config(source: nn.Module | str | Path, base: str | Path | None, lora: CanonicalLora) -> Any:
    """Return the transformers configuration of an adapter's base model; ExportError if it is not known."""
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        if not hasattr(config, "model_type"):
            raise ExportError(
                f"this {type(source).__name__} has no transformers configuration, from which the GGUF names follow; "
                "give a model of transformers"
            )
        return config
    from transformers import AutoConfig

    folder = base or lora.base
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise ExportError(
            f"{source}: the folder of its base model is not known (got {folder}); give base=, a folder with config.json"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _tensors(lora: CanonicalLora, layout: GgufLayout) -> dict[str, Tensor]:
    tensors = {}
    for path, (a, b) in lora.layers.items():
        name = layout.name(path)
        if layout.tied and name in (EMBEDDINGS, HEAD):
            raise ExportError(
                f"{path} is one of two tied layers (embeddings and output head), and llama.cpp cannot adapt one of the "
                "two: it refuses the file, or aborts. Train without this layer, or use export_gguf_merged"
            )
        tensors[f"{name}.weight.lora_a"] = a.T if path in lora.embeddings else a
        tensors[f"{name}.weight.lora_b"] = layout.to_file(name, b)
    return tensors
