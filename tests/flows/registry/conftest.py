"""Keys of several people, and the list of those who may sign."""

import subprocess
from pathlib import Path

import pytest
from registries import Key


@pytest.fixture
def key(tmp_path: Path) -> Key:
    """`key("ada")`: an ssh key of hers; the file `signers` lists it, unless it is mallory's."""

    def make(who: str) -> Path:
        path = tmp_path / who
        if not path.exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", who, "-f", str(path)]
            subprocess.run(command, check=True)
            if who != "mallory":
                with (tmp_path / "signers").open("a") as signers:
                    signers.write(f"{who}@example.org {path.with_suffix('.pub').read_text()}")
        return path

    (tmp_path / "signers").touch()
    return make


@pytest.fixture
def signers(tmp_path: Path) -> Path:
    return tmp_path / "signers"
