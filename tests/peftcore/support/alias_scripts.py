"""Running a script twice: on HF PEFT, and on peftcore through the alias."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEADER = """\
import json
import os
import sys
import torch

folder, library = sys.argv[1:3]
results = {}


def fill(model, name=""):
    # the same values on both sides, in the order of the layers
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key and f".{name}" in key:
                parameter.normal_(std=0.1)


"""
OLDER_PEFT = """\
if library == "theirs":  # the installed HF PEFT may be older than transformers asks for, and has all that is called
    import transformers.integrations.peft as integration
    integration.MIN_PEFT_VERSION = "0.21.0"
"""
"""Lines for scripts that call transformers' methods of adapters."""
FOOTER = "\nprint(json.dumps(results))\n"


def results(script: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a script puts into `results`: (on peftcore, on HF PEFT)."""
    return run(script, folder, "ours", "-m", "peftcore.as_peft"), run(script, folder, "theirs")


def run(script: str, folder: Path, library: str, *before: str) -> dict[str, Any]:
    """Return what a script puts into `results`, run with one library."""
    place = folder / library
    place.mkdir(parents=True)
    path = place / "script.py"
    path.write_text(HEADER + script + FOOTER)
    command = [sys.executable, "-W", "ignore", *before, str(path), str(place), library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Check that all results are equal, numbers up to a tolerance."""
    assert list(ours) == list(theirs)
    for name in theirs:
        is_numbers = isinstance(theirs[name], list) and all(isinstance(x, float) for x in theirs[name])
        expected = pytest.approx(theirs[name], rel=tolerance, abs=tolerance) if is_numbers else theirs[name]
        assert ours[name] == expected, name
