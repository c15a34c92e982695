"""Export of adapters to other runtimes, and merging with little memory.

| function | writes | module |
|---|---|---|
| `merge_streaming` | a transformers folder with a merged adapter, one weight in memory at a time | `streaming` |
| `export_vllm` | a LoRA directory for vLLM and LoRAX | `vllm` |
| `export_gguf_lora` | a GGUF LoRA for llama.cpp | `gguf_lora` |
| `export_gguf_merged` | a GGUF model with a merged adapter for llama.cpp | `gguf_merged` |

All but `merge_streaming` start from `canonicalise` (`canonical`), a LoRA with α = rank and no per-layer options.
`check_vllm` (`vllm_rules`) and `check_gguf_base` (`gguf_base`) tell in advance what an export would refuse.

Streaming uses `mapped_model` (a model whose weights stay on disk), `merged_tensors` (the tensors to write) and
`safetensors_stream` (the file format). GGUF uses `peftcore.gguf_files.layout` (names and order of rows), `gguf_base`
(the base model), `gguf_folder` and `gguf_tokenizer` (a transformers folder as GGUF).
"""

# ruff: noqa: E402 (the check has to come before the imports that need the packages)
from peftcore.errors import ExportError, require_extra

require_extra("export", "peftcore.export", "gguf")

from peftcore.export.canonical import CanonicalLora, canonicalise
from peftcore.export.gguf_base import check_gguf_base
from peftcore.export.gguf_lora import export_gguf_lora
from peftcore.export.gguf_merged import export_gguf_merged
from peftcore.export.streaming import merge_streaming
from peftcore.export.vllm import export_vllm
from peftcore.export.vllm_rules import check_vllm

__all__ = [
    "CanonicalLora",
    "ExportError",
    "canonicalise",
    "check_gguf_base",
    "check_vllm",
    "export_gguf_lora",
    "export_gguf_merged",
    "export_vllm",
    "merge_streaming",
]
