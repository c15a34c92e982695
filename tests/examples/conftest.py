"""A base for the examples, fetched once, and a copy of the folder `examples` to run in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def base_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`base.source` of SmolLM2: the folder that the pipeline has fetched here, else one that is fetched now."""
    from flows.params import Params
    from flows.paths import Paths
    from flows.stages import fetch

    paths = Paths(ROOT)
    if not (paths.base / "SHA256SUMS").exists():
        paths = Paths(tmp_path_factory.mktemp("smollm2"))
        fetch.run(Params(), paths)
    return f"path:{paths.base}"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of the repository's examples beside the documents that they link to; examples write into their folder."""
    ignored = shutil.ignore_patterns("data", "out", "base", "__pycache__")
    return Path(shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=ignored))


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., str]:
    """`shell(script, folder, NAME=value)`: run a shell script with this environment's commands and an own home."""

    def run(script: str, folder: Path, **variables: str) -> str:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        imported = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        identity = {
            f"GIT_{who}_{what}": "ada@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}
        environment = {**os.environ, **identity, **quiet, "HOME": str(home), "PATH": path, "PYTHONPATH": imported}
        done = subprocess.run(
            ["bash", "-eu", "-c", script],
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
