"""A low-rank product for few tokens in one call, from C that is compiled when it is first needed.

A decoding step reads the weights of the whole model, which drives everything else out of the processor's caches. So
the four operations of a low-rank branch (cast, two products, addition) cost far more than their arithmetic: 50 to 65 us
a layer on a CPU, where one call of compiled code takes 14. PyTorch has no such operation.

`low_rank.c` needs a C compiler (`CC`, cc, gcc or clang) and takes half a second once; the result lies in
`$XDG_CACHE_HOME/peftcore` (`~/.cache/peftcore`). Without a compiler, and with `PEFTCORE_COMPILE=0`, the layers use
PyTorch's operations. The numbers are the same but for the rounding of float32.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("low_rank.c")
FLAGS = (("-O3", "-march=native"), ("-O3", "-mcpu=native"))
"""Flags to try, in order: some compilers for ARM do not know the first ones. Code for any processor would be slow."""
MOST_WORK = 2**21
"""Largest number of multiplications of one call (count): more of them are worth PyTorch's threads."""
NAMES = {torch.float32: "add_low_rank_float32", torch.bfloat16: "add_low_rank_bfloat16"}
"""{type of x and y: name of the C function}"""
_PLAIN = (Tensor, nn.Parameter)

_Function = Callable[..., int]


def add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor | None, gain: Tensor | None, scaling: Any
) -> bool:
    """Make g∘(y + s·BΛA x) of y in place, without gradients, if the compiled function fits.

    Args:
        y: (..., o) in new memory, float32 or bfloat16.
        x: (..., i) of y's type.
        a: A (r, i) in float32.
        b: B (o, r) in float32.
        diagonal: Λ, r elements in float32; None for ones.
        gain: g, o elements in float32; None for ones.
        scaling: s.

    Returns:
        True if y is changed. False, with y as it was, for much work, for other types, devices, strides or subclasses of
        tensors, inside of a `TorchDispatchMode`, and where nothing could be compiled.
    """
    dtype = x.dtype
    function = compiled().get(dtype)
    if (
        function is None
        or y.dtype is not dtype
        or a.dtype is not torch.float32
        or b.dtype is not torch.float32
        or type(scaling) is not float
        or type(x) is not Tensor
        or type(y) is not Tensor
        or type(a) not in _PLAIN
        or type(b) not in _PLAIN
        or not (x.is_cpu and y.is_cpu and a.is_cpu and b.is_cpu)
        or not (x.is_contiguous() and y.is_contiguous() and a.is_contiguous() and b.is_contiguous())
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    r, inputs = a.shape
    outputs = y.shape[-1]
    rows = y.numel() // outputs
    if (
        x.shape[-1] != inputs
        or x.numel() != rows * inputs
        or b.shape != (outputs, r)
        or rows * r * (inputs + outputs) > MOST_WORK
    ):
        return False
    e = g = None
    if diagonal is not None:
        if not _is_vector(diagonal, r):
            return False
        e = diagonal.data_ptr()
    if gain is not None:
        if not _is_vector(gain, outputs):
            return False
        g = gain.data_ptr()
    pointers = y.data_ptr(), x.data_ptr(), a.data_ptr(), b.data_ptr()
    return function(*pointers, e, g, scaling, rows, inputs, r, outputs) == 1


def _is_vector(tensor: Tensor, length: int) -> bool:
    is_plain = type(tensor) in _PLAIN and tensor.dtype is torch.float32 and tensor.is_cpu
    return is_plain and tensor.numel() == length and tensor.is_contiguous()


@cache
def compiled() -> dict[torch.dtype, _Function]:
    """Return {type: C function}; empty, with the reason in the log, where nothing can be compiled."""
    if os.environ.get("PEFTCORE_COMPILE", "1") == "0":
        return {}
    try:
        library = ctypes.PyDLL(str(library_file()))  # holds Python's lock: giving it up costs as much as the product
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("decoding uses PyTorch's operations, because low_rank.c cannot be compiled: %s", error)
        return {}
    return {dtype: _declared(getattr(library, name)) for dtype, name in NAMES.items()}


def _declared(function: Any) -> _Function:
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_float] + [ctypes.c_long] * 4
    function.restype = ctypes.c_int
    return function


def library_file() -> Path:
    """Return the compiled library, which is compiled now if this machine has not done so yet.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the cache cannot be written.
    """
    compiler = _compiler()
    source = SOURCE.read_bytes()
    made_of = (source, repr((compiler, FLAGS)).encode(), _processor().encode())
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcore"
    file = folder / f"low_rank-{name}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            new = Path(own) / file.name
            _compile(compiler, new)
            new.replace(file)  # at once: other processes may be compiling the same file
    return file


def _compiler() -> list[str]:
    """Return the command of the C compiler."""
    if given := os.environ.get("CC"):
        return shlex.split(given)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("there is no C compiler: neither cc, gcc nor clang, and CC is not set")


def _compile(compiler: list[str], file: Path) -> None:
    errors = []
    for flags in FLAGS:
        command = [*compiler, *flags, "-shared", "-fPIC", "-o", str(file), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if not done.returncode:
            return
        errors.append(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    raise RuntimeError("; ".join(errors))


def _processor() -> str:
    """Return a text that differs between processors for which the compiler makes different code."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
