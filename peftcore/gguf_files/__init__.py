"""GGUF files of base models: their header (`header`), names and order of rows (`layout`), and loading (`model`)."""

from peftcore.errors import require_extra

require_extra("export", "peftcore.gguf_files", "gguf")
