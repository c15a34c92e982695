"""Adapters, prompts and trainers on a device besides the CPU: a tensor on the wrong one is an error, as with a GPU."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).parent / "support"
pytestmark = [
    pytest.mark.proof,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja")),
        reason="compiling the device needs a C++ compiler (c++, or CXX) and ninja",
    ),
]


@pytest.fixture
def build_folder() -> Path:
    """Where the device is compiled, once for each version of PyTorch; several processes may ask at once."""
    return Path(tempfile.gettempdir()) / f"peftcore_second_device_{torch.__version__}"


@pytest.mark.parametrize("script", ["layers_on_device", "models_on_device", "trainers_on_device"])
def test_everything_lies_on_the_models_device(script: str, build_folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(SUPPORT / f"{script}.py"), str(build_folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert "steps" in ended.stdout
