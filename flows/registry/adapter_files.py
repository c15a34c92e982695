"""Checks of an adapter folder's files and weights, without torch and without unpickling."""

from pathlib import Path

import numpy
from safetensors import SafetensorError, deserialize

from flows.paths import CORRECTED_STORAGE
from peftcore.files import MANIFEST, read_limited

TOKENIZER = frozenset({"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"})
"""Files of the tokenizer, which an adapter with added tokens or another chat template has."""
ALLOWED = (
    frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST, CORRECTED_STORAGE})
    | TOKENIZER
)

_FLOATS = {"F64": numpy.float64, "F32": numpy.float32, "F16": numpy.float16}
_EXPONENT = {"BF16": (numpy.uint16, 0x7F80), "F8_E5M2": (numpy.uint8, 0x7C)}
"""{type that numpy lacks: (unsigned integer type, exponent's bits)}; infinity and NaN have all exponent bits set."""


def foreign_files(folder: Path) -> list[str]:
    """Return the entries that an adapter folder may not have, sorted: other files, sub-folders, links, devices."""
    if not folder.is_dir() or folder.is_symlink():
        return [f"{folder} (no folder)"]
    return sorted(
        entry.name if entry.name.isprintable() else repr(entry.name)  # control characters would reach the terminal
        for entry in folder.iterdir()
        if entry.name not in ALLOWED or entry.is_symlink() or not entry.is_file()
    )


def non_finite_tensors(folder: Path) -> tuple[list[str], int]:
    """Return the names of tensors that hold NaN or infinity or cannot be read, and the number of tensors."""
    bad, count = [], 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = deserialize(read_limited(path, path.stat().st_size))
        except (SafetensorError, OSError, ValueError) as error:
            return [f"{path.name} (not readable: {error})"], count
        count += len(tensors)
        # safetensors gives the tensors of a file in a random order
        bad += sorted(name for name, tensor in tensors if not _is_finite(tensor["dtype"], tensor["data"]))
    return bad, count


def _is_finite(dtype: str, data: bytes | bytearray) -> bool:
    if dtype in _FLOATS:
        return bool(numpy.isfinite(numpy.frombuffer(data, _FLOATS[dtype])).all())
    if dtype in _EXPONENT:
        unsigned, exponent = _EXPONENT[dtype]
        return not bool((numpy.frombuffer(data, unsigned) & exponent == exponent).any())
    if dtype == "F8_E4M3":  # has no infinity; NaN has all bits set except the sign
        return not bool((numpy.frombuffer(data, numpy.uint8) & 0x7F == 0x7F).any())
    return dtype.startswith(("I", "U", "BOOL"))
