"""Downloads from the Hugging Face hub, asked for by a `hub:NAME[@REVISION]` source and by nothing else."""

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
    """A download that failed; holds the downloader's last words. Callers say which parameter asked for it."""


def download(source: str, kind: Literal["model", "dataset"]) -> Path:
    """The local snapshot of `hub:NAME[@REVISION]`; without a network the cached one, if there is one.

    In a process of its own, because a stage is offline from the moment that it imports the hub's library.
    Raises DownloadError.
    """
    name, _, revision = source.removeprefix("hub:").partition("@")
    return Path(run_downloader("-c", _DOWNLOAD, name, revision, kind).splitlines()[-1])


def run_downloader(*arguments: str) -> str:
    """Run this Python with the hub allowed; returns its stdout or raises DownloadError."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        last = (errors or lines or [f"it ended with status {done.returncode}"])[-1]
        raise DownloadError(last.removeprefix("ERROR: ").rstrip(". "))
    return done.stdout
