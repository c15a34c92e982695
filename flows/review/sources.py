"""Which runs are meant by what a person types: folders, a server's project, versions, stages, experiments."""

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
    """The runs that `names` mean, each once; root: the pipeline that versions and experiments are of, if there is one.

    A name is a path of W&B's folders, wandb:ENTITY/PROJECT[/RUN_ID], exp:[NAME] of DVC, a version, or a stage.
    Raises ReviewError (or RegistryError for a version) naming the first that is not there.
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
                f"{name} is no folder of W&B runs, and versions and experiments need a pipeline, which {Path.cwd()} "
                "is not in; give a folder such as wandb/offline-run-20260101_120000-abc123, or wandb:ENTITY/PROJECT"
            )
        elif name.startswith(EXPERIMENT):
            runs += versions.experiments(name.removeprefix(EXPERIMENT))
        elif "/" in name:
            raise ReviewError(f"{name} is not there; give a folder of W&B runs, or wandb:{name} for a server's project")
        else:
            runs.append(versions.version(name))
    runs = joined(runs + offline.read(dict.fromkeys(files)))
    once = list({(run.id, run.where): run for run in runs}.values())
    return once if versions is None else versions.marked(once)


def pipeline_root() -> Path | None:
    """The pipeline that the current folder is in, None outside of one: W&B's runs can be compared anywhere."""
    try:
        return find_root()
    except RepositoryError:
        return None
