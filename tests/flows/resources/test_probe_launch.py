"""The probe's process as its parent sees it."""

from pathlib import Path

import pytest

from flows.errors import EstimateError
from flows.resources import probe_launch
from flows.resources.probe import Task
from flows.resources.probe_launch import Probe

TASK = Task({}, "base", [], [], [], 9, 5)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that is run in place of Python."""
    file = tmp_path / "program"
    monkeypatch.setattr(probe_launch.sys, "executable", str(file))
    return file


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("cat > /dev/null; echo trouble >&2; echo 'error: no GPU' >&2; exit 1", "failed: no GPU"),
        ("cat > /dev/null; kill -9 $$", "lack of memory; use --no-probe"),
        ("exec sleep 30", "longer than 0.5 seconds; allow more with --probe-timeout"),
    ],
)
def test_a_probe_that_fails_or_hangs_is_one_message(program: Path, script: str, said: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with Probe() as probe, pytest.raises(EstimateError, match=said):
        probe.measure([TASK], 0.5 if "sleep" in script else 60)


def test_a_probe_without_tasks_ends_with_its_context(program: Path) -> None:
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    with Probe() as probe:
        assert probe._process.poll() is None
    assert probe._process.returncode == -9
