"""Other values for keys of params.yaml, KEY=VALUE in the notation of `dvc exp run -S`, tried before anything runs."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import ParamsError
from flows.params.model import load_params


def parameter_sets(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `key=value1,value2`. Raises ParamsError."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import get_hydra_sweeps
    from hydra.errors import HydraException

    try:
        return [tuple(one["params.yaml"]) for one in get_hydra_sweeps({"params.yaml": list(overrides)})]
    except (DvcException, HydraException) as error:
        raise ParamsError(f"{' '.join(overrides)} cannot be read ({error}); give key=value1,value2") from error


def check_overrides(params: Path, *sets: Sequence[str]) -> None:
    """Raises ParamsError for the first set that does not fit the file `params`, which stays as it is."""
    for overrides in sets:
        with TemporaryDirectory(prefix="peftcore-overrides-") as folder:
            apply_overrides(Path(shutil.copyfile(params, Path(folder) / params.name)), overrides)


def apply_overrides(params: Path, overrides: Sequence[str]) -> None:
    """Put `overrides` into the file `params`. Raises ParamsError for what does not fit there."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides as apply

    try:
        apply(params, [forced(override) for override in overrides])
    except DvcException as error:
        raise ParamsError(
            f"{' '.join(overrides)} does not fit {params.name}: {error.__cause__ or error}; give KEY=VALUE, as "
            "train.learning_rate=1e-3"
        ) from error
    load_params(params)


def forced(override: str) -> str:
    """The override as one that may also set what the file leaves to its default; a key that is none is found later."""
    return override if override.startswith(("+", "~")) else f"++{override}"
