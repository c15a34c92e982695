"""Adapters for the runtimes that people serve with, and merges that need little memory.

`canonical.py` the one form to export from; `gguf_*.py` llama.cpp;
`vllm.py`, `vllm_rules.py` vLLM and LoRAX; `streaming.py` a merge from safetensors to safetensors.
"""

# ruff: noqa: E402 (the check has to come before the imports that need the packages)
from peftcore.errors import require_extra

require_extra("export", "peftcore.export", "gguf")

from peftcore.export.canonical import CanonicalLora, canonicalise
from peftcore.export.errors import ExportError
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
