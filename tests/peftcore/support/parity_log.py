"""The one comparison with HF `peft`; `benchmarks/parity.py` reads what it found through a file."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

TOLERANCE = 1e-5
"""In float32: absolute, and relative to the oracle's value."""
LOG = "PEFTCORE_PARITY_LOG"
"""Environment variable: a file to which each comparison is appended as a line of JSON."""


def agree(ours: Tensor, theirs: Tensor, method: str, subject: str, made_by: str) -> None:
    """Assert that both libraries compute the same from one directory.

    subject: the model family or the kind of layer; made_by: "peft" or "peftcore", who wrote the directory.
    """
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    if log := os.environ.get(LOG):
        record = {
            "method": method,
            "subject": subject,
            "made_by": made_by,
            "difference": (ours - theirs).abs().max().item(),
            "scale": theirs.abs().max().item(),
        }
        with Path(log).open("a") as lines:
            lines.write(json.dumps(record) + "\n")
