"""The command `peftcore`, also `python -m flows`: one line instead of a traceback if its packages are missing."""

import io
import os
import sys

from peftcore.errors import MissingExtraError, require_extra

MODULES = (
    "accelerate",
    "bitsandbytes",
    "configobj",
    "datasets",
    "datasketch",
    "dvc",
    "dvc_data",
    "fastapi",
    "gguf",
    "gto",
    "h11",
    "httpx",
    "hydra",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "networkx",
    "prefect",
    "prometheus_client",
    "psutil",
    "pyarrow",
    "pydantic",
    "pydantic_core",
    "rich",
    "rouge_score",
    "ruamel",
    "scipy",
    "starlette",
    "typer",
    "uvicorn",
    "wandb",
)
"""Top-level modules of the packages that the extra `pipeline` brings."""


CLOSED_PIPE = 141
"""Exit status if the reader of stdout has closed it, as `head` does; shells give it to programs that SIGPIPE ends."""


def main() -> None:
    """Run the command line; exit with status 1 if the extra `pipeline` is not installed."""
    try:
        require_extra("pipeline", "the command `peftcore`", *MODULES)
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    prepare_streams()
    use_utf_8()
    from flows.cli import app

    try:
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer ends with 1, the status of failures
            sys.exit(CLOSED_PIPE)
        raise


def prepare_streams() -> None:
    """Make stdout and stderr usable for every text and width.

    A closed stream (`>&-`) leads to the null device, because the next opened file would get its descriptor. Characters
    that an encoding lacks, such as the gate's marks, are written as escapes. COLUMNS=0, of terminals without a size,
    is removed: `rich` would print nothing.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
            os.set_inheritable(descriptor, True)  # as other processes expect of these three
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]


def use_utf_8() -> None:
    """Start this command again in Python's UTF-8 mode, if names of files have another encoding.

    git and DVC store names in UTF-8. The processes below this one inherit the mode. The streams keep their encoding.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        environment = {"PYTHONIOENCODING": sys.stdout.encoding, **os.environ, "PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    main()
