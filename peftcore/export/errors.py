"""What exporting refuses."""

from peftcore.errors import PeftError


class ExportError(PeftError, ValueError):
    """An adapter or a base that a file format, or the runtime that reads it, cannot hold; nothing was written."""
