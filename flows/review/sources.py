"""Lookup of the runs that a user names: folders, a server's project, versions, stages, experiments."""

from collections.abc import Iterable
from pathlib import Path

from flows.errors import RepositoryError, ReviewError
from flows.params import load_params
from flows.paths import Paths
from flows.review import offline, online
from flows.review.run import Run, joined
from flows.review.versions import Versions
from flows.runtime.project import find_root

ONLINE, EXPERIMENT = "wandb:", "exp:"


def read_runs(names: Iterable[str], root: Path | None) -> list[Run]:
    """Return the runs with these names, each once.

    Args:
        names: paths of W&B's folders, wandb:ENTITY/PROJECT[/RUN_ID], exp:[NAME] of DVC, versions, or stages.
        root: the pipeline of the versions and experiments; None outside of a pipeline.

    Raises:
        ReviewError: a run does not exist or cannot be read.
        RegistryError: a version does not exist.
    """
    versions = None if root is None else Versions(root, load_params(Paths(root).params))
    runs: list[Run] = []
    files: list[Path] = []
    for name in names:
        if name.startswith(ONLINE):
            runs += online.read(name.removeprefix(ONLINE))
        elif Path(name).exists():
            files += offline.find(Path(name))
        elif versions is None:
            raise ReviewError(
                f"{name} is not a folder of W&B runs, and versions and experiments need a pipeline, but {Path.cwd()} "
                "is not in one; give a folder such as wandb/offline-run-20260101_120000-abc123, or wandb:ENTITY/PROJECT"
            )
        elif name.startswith(EXPERIMENT):
            runs += versions.experiments(name.removeprefix(EXPERIMENT))
        elif "/" in name:
            raise ReviewError(
                f"{name} does not exist; give a folder of W&B runs, or wandb:{name} for a server's project"
            )
        else:
            runs.append(versions.version(name))
    runs = joined(runs + offline.read(dict.fromkeys(files)))
    once = list({(run.id, run.where): run for run in runs}.values())
    return once if versions is None else versions.marked(once)


def pipeline_root() -> Path | None:
    """Return the current folder's pipeline; None outside of a pipeline, where W&B's runs can be compared too."""
    try:
        return find_root()
    except RepositoryError:
        return None
