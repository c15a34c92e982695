"""C code that is compiled when it is first needed.

It needs a C compiler (`CC`, cc, gcc or clang) and takes a few seconds once; the result lies in
`$XDG_CACHE_HOME/peftcore` (`~/.cache/peftcore`). Without a compiler, and with `PEFTCORE_COMPILE=0`, PyTorch's
operations do the work. A wheel with compiled code would be needed for each system and version of Python.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (
    "low_rank.c",
    "low_rank_of_prompts.c",
    "packed_product.c",
    "attention.c",
    "attention_of_prompts.c",
    "rms_norm.c",
    "rotary.c",
    "dropout.c",
    "quantize_4bit.c",
    "checksum.c",
)
"""Files to compile, in `FOLDER`."""
HEADERS = ("vectors.h",)
"""Files that they include."""
FLAGS = (("-O3", "-march=native"), ("-O3", "-mcpu=native"))
"""Flags to try, in order: some compilers for ARM do not know the first ones. Code for any processor would be slow."""


@cache
def library() -> ctypes.PyDLL | None:
    """Return the compiled functions; None, with the reason in the log, where nothing can be compiled."""
    if os.environ.get("PEFTCORE_COMPILE", "1") == "0":
        return None
    try:
        return ctypes.PyDLL(str(library_file()))  # holds Python's lock: giving it up costs as much as a small product
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("PyTorch's operations do the work of C code, which cannot be compiled: %s", error)
        return None


def takes_calls() -> bool:
    """Return True if a calculation may be one call here: without gradients, and where nothing has to see operations."""
    return not (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


@cache
def openmp() -> int | None:
    """Return the address of `GOMP_parallel` in the OpenMP library of this PyTorch; None if it has no such function.

    Work is done in the threads that PyTorch has already. Threads of another library would compete with them, because
    both kinds wait by spinning.
    """
    library = ctypes.CDLL(torch._C.__file__)  # a name is also looked up in the libraries that it needs
    function = getattr(library, "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def library_file() -> Path:
    """Return the compiled library, which is compiled now if this machine has not done so yet.

    Raises:
        RuntimeError: there is no compiler, it fails, or others could have put code into the cache.
        OSError: the cache cannot be written.
    """
    compiler = _compiler()
    sources = [(FOLDER / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    made_of = (*sources, repr((compiler, FLAGS)).encode(), _processor().encode())
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcore"
    file = folder / f"kernels-{name}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{folder} belongs to another user, or others can write to it")
    if not file.exists():
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
    errors, files = [], [str(FOLDER / name) for name in SOURCES]
    for flags in FLAGS:
        command = [*compiler, *flags, "-shared", "-fPIC", "-o", str(file), *files]
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
