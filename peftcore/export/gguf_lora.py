"""A LoRA as a GGUF file that llama.cpp puts onto its own copy of the base.

Tensors `<name>.weight.lora_a` (r, i) and `.lora_b` (o, r); for `token_embd` lora_a is (v, r). llama.cpp scales by
α/r, and not at all where α is 0; the true scale is in B, so α = 0 is written.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor, nn

from peftcore.errors import ExportError
from peftcore.export.canonical import CanonicalLora, canonicalise
from peftcore.export.gguf_layout import EMBEDDINGS, HEAD, GgufLayout, layout_of
from peftcore.files import file_written_atomically

DTYPES = {"float32": np.float32, "float16": np.float16}


def export_gguf_lora(
    source: nn.Module | str | Path,
    adapter_name: str,
    file: str | Path,
    base: str | Path | None = None,
    dtype: str = "float32",
) -> Path:
    """Write one adapter of a model, or of a directory, as a GGUF LoRA; gives the file's path.

    base: of a directory's adapter, the transformers folder of the model it is for; None: where its configuration
    says. dtype: "float32" or "float16". Use it as `llama-cli -m base.gguf --lora file`.
    Raises ExportError for an adapter, a layer or an architecture that llama.cpp cannot take; nothing is then written.
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
    """The transformers configuration of the model that an adapter is for; ExportError where there is none."""
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        if not hasattr(config, "model_type"):
            raise ExportError(f"this {type(source).__name__} has no transformers configuration, so GGUF has no names")
        return config
    from transformers import AutoConfig

    folder = base or lora.base
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise ExportError(
            f"{source}: its base model's folder is not known ({folder}); give base=, a folder with config.json"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _tensors(lora: CanonicalLora, layout: GgufLayout) -> dict[str, Tensor]:
    tensors = {}
    for path, (a, b) in lora.layers.items():
        name = layout.name(path)
        if layout.tied and name in (EMBEDDINGS, HEAD):
            raise ExportError(
                f"{path} shares its weight with the other end of the model, and llama.cpp cannot change one of the "
                "two: it refuses the file, or aborts. Leave the layer out, or use export_gguf_merged"
            )
        tensors[f"{name}.weight.lora_a"] = a.T if path in lora.embeddings else a
        tensors[f"{name}.weight.lora_b"] = layout.to_file(name, b)
    return tensors
