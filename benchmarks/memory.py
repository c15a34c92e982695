"""The most memory that this process has held; what a process started before it held is not in it."""

import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """Peak resident memory of this process so far (bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage's figure is inherited over fork and exec from a larger parent
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
