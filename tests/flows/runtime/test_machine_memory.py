"""The figures of memory, also where the system has no /proc."""

from pathlib import Path

import numpy
import psutil
import pytest
import torch

from flows.runtime import machine_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_proc", [True, False])
def test_the_peak_holds_what_was_allocated(has_proc: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_proc:  # as on macOS
        monkeypatch.setattr(machine_memory, "_STATUS", tmp_path / "absent")
        monkeypatch.setattr(machine_memory, "_CLEAR_REFS", tmp_path / "absent")
    machine_memory.forget_peak(CPU)
    block = numpy.ones(64 << 20, dtype=numpy.uint8)
    peak = machine_memory.peak_memory(CPU)
    assert block.nbytes < peak < psutil.virtual_memory().total


def test_the_limit_is_the_machines_without_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_memory, "_CGROUP_LIMITS", (tmp_path / "absent",))
    assert machine_memory.memory_limit(CPU) == psutil.virtual_memory().total
