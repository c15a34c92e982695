"""The fused path on several processes (gloo, CPU): DDP and FSDP2 give one process's loss and gradients."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from two_processes import PROCESSES, step, step_of_one_process


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_equals_one_process(way: str, tmp_path: Path) -> None:
    mp.spawn(step, (way, str(tmp_path)), nprocs=PROCESSES)
    found = torch.load(tmp_path / "result.pt")
    loss, gradients = step_of_one_process()
    assert found["taken"] == [3, 1, 2, 1] * 2  # the fused path, with its shared inputs
    assert abs(found["loss"].item() - loss) < 1e-6  # transformers takes the loss in float32
    assert found["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-6, rtol=0)
