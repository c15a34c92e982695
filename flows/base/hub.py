"""Downloads from the Hugging Face hub, only for `hub:NAME[@REVISION]` sources."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
name, revision, kind = sys.argv[1:]
print(snapshot_download(name, revision=revision or None, repo_type=kind))
"""


class DownloadError(Exception):
    """A failed download, with the downloader's last message. Callers add the parameter that names the source."""


def download(source: str, kind: Literal["model", "dataset"]) -> Path:
    """Return the local snapshot of `hub:NAME[@REVISION]`; without a network, the cached one.

    The download runs in its own process, because a stage is offline from its first import of the hub's library.

    Raises:
        DownloadError: There is no snapshot.
    """
    name, _, revision = source.removeprefix("hub:").partition("@")
    return Path(run_downloader("-c", _DOWNLOAD, name, revision, kind).splitlines()[-1])


def run_downloader(*arguments: str) -> str:
    """Run this Python with hub access and return its stdout. Raises DownloadError."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        last = (errors or lines or [f"exit status {done.returncode}"])[-1]
        raise DownloadError(last.removeprefix("ERROR: ").rstrip(". "))
    return done.stdout
