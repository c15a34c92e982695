"""Keys in the environment and in .dvc/config.local reach nothing that a whole run writes or says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlanted",
    "AWS_SECRET_ACCESS_KEY": "PlantedAwsPlantedAwsPlantedAwsPlantedAws",
    "PEFTCORE_API_KEYS": "planted-serving-key",
}
IN_DVC = "PlantedInDvcPlantedInDvcPlantedInDvc"
DVC_LOCAL = f"['remote \"cloud\"']\n    url = s3://bucket/path\n    secret_access_key = {IN_DVC}\n"
COMMANDS = """
from pathlib import Path
from flows.cli import app

def run(*arguments, status=0):
    try:
        app(list(arguments))
    except SystemExit as ended:
        assert (ended.code or 0) == status, (arguments, ended.code)

run("run")
run("status")
run("registry", "list")
Path("make.py").write_text("raise RuntimeError('a crash, whose words are shown')")
run("run", status=1)
"""
MIRROR = """
import pathlib, sys
from flows.params import load_params
from flows.runtime.tracking import Tracker
root = pathlib.Path(sys.argv[1])
tracker = Tracker("p", "offline", load_params(root / "params.yaml").model_dump(), root)
assert tracker.run_id
tracker.log({"step": 1, "loss": 2.5})
tracker.finish({"steps": 1}, adapter=root / "artifacts" / "adapter")
"""


def everything_written(root: Path) -> Iterator[tuple[str, bytes]]:
    """(where, bytes) of each file below, and of git's objects as they were before git packed them."""
    for path in root.rglob("*"):
        if path.is_file() and path.name != "config.local":
            yield str(path.relative_to(root)), path.read_bytes()
    command = ["git", "cat-file", "--batch", "--batch-all-objects"]
    done = subprocess.run(command, cwd=root / "project", capture_output=True, check=True)
    assert b"docstrings" in done.stdout
    yield "git's objects", done.stdout


def leaks(places: Iterator[tuple[str, bytes]]) -> list[str]:
    needles = {**PLANTED, ".dvc/config.local": IN_DVC}
    return [
        f"{name} in {where}" for where, content in places for name, key in needles.items() if key.encode() in content
    ]


@pytest.mark.slow
def test_no_planted_key_is_found_in_anything_written_or_said(project: Any, tmp_path: Path) -> None:
    (project.root / ".dvc" / "config.local").write_text(DVC_LOCAL)
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, **PLANTED, "HOME": str(home), "WANDB_MODE": "offline", "WANDB_DIR": str(project.root)}

    def run(script: str) -> bytes:
        command = [sys.executable, "-c", script, str(project.root)]
        done = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout + done.stderr

    said = [run(COMMANDS), run(MIRROR)]
    assert b"a crash, whose words are shown" in said[0]
    assert {"wandb", ".prefect", "reports"} <= {path.name for path in project.root.iterdir()}
    places = [*everything_written(tmp_path), *((f"what was said ({n})", text) for n, text in enumerate(said))]
    assert len(places) > 100
    assert leaks(iter(places)) == []


def test_the_search_finds_what_is_there(project: Any, tmp_path: Path) -> None:
    """Or it would prove nothing: a key in a file, and one in a commit that no file shows."""
    (project.root / "note").write_text(PLANTED["HF_TOKEN"])
    project.git("commit", "--allow-empty", "--message", IN_DVC)
    found = leaks(everything_written(tmp_path))
    assert "HF_TOKEN in project/note" in found and ".dvc/config.local in git's objects" in found
