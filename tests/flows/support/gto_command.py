"""GTO's command line in this process, without the second of its start."""

from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

from gto.cli import app


def run_gto(root: Path, *arguments: str) -> str:
    """Run a command of GTO in a repository; returns what the command prints. An error of the command is raised."""
    with chdir(root), redirect_stdout(StringIO()) as out:
        app.main(list(arguments), prog_name="gto", standalone_mode=False)
    return out.getvalue()
