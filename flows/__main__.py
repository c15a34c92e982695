"""The command `peftcore`, also `python -m flows`: one line instead of a traceback if its packages are missing."""

import sys

from peftcore.errors import MissingExtraError, require_extra

MODULES = (
    "accelerate",
    "bitsandbytes",
    "configobj",
    "cronsim",
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


def main() -> None:
    """Run the command line; exit with status 1 if the extra `pipeline` is not installed."""
    try:
        require_extra("pipeline", "the command `peftcore`", *MODULES)
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    from flows.cli import app

    app()


if __name__ == "__main__":
    main()
