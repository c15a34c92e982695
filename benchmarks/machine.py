"""What a figure was measured on; every benchmark prints it under its table."""

import datetime
import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """CPU model, cores in use, load, versions and date, in one line."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{cpu_model()}, {torch.get_num_threads()} of {os.cpu_count()} cores in use{load}, "
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )


def cpu_model() -> str:
    """Model name of the first CPU, and AMX where it has it, because bf16 without it is another machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    amx = " with AMX" if "amx_bf16" in fields.get("flags", "").split() else ""
    return (fields.get("model name") or platform.processor() or platform.machine()) + amx
