"""GGUF files of base models: their header (`header`), names and order of rows (`layout`), and loading (`model`)."""

# ruff: noqa: E402 (the check has to come before the imports that need the package)
from peftcore.errors import require_extra

require_extra("export", "peftcore.gguf_files", "gguf")

from peftcore.gguf_files.header import GgufHeader, read_gguf_header
from peftcore.gguf_files.model import load_gguf_base, save_gguf_base

__all__ = ["GgufHeader", "load_gguf_base", "read_gguf_header", "save_gguf_base"]
