"""Overrides of params.yaml, written KEY=VALUE like those of `dvc exp run -S`, and checked before anything runs."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import ParamsError
from flows.params.params import load_params


def parameter_sets(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each combination of the values in `key=value1,value2`. Raises ParamsError for one that cannot be read."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import get_hydra_sweeps
    from hydra.errors import HydraException

    try:
        return [tuple(one["params.yaml"]) for one in get_hydra_sweeps({"params.yaml": list(overrides)})]
    except (DvcException, HydraException) as error:
        raise ParamsError(f"{' '.join(overrides)} cannot be read ({error}); give key=value1,value2") from error


def check_overrides(params: Path, *sets: Sequence[str]) -> None:
    """Raise ParamsError for the first set that does not fit the file `params`; the file does not change."""
    for overrides in sets:
        with TemporaryDirectory(prefix="peftcore-overrides-") as folder:
            apply_overrides(Path(shutil.copyfile(params, Path(folder) / params.name)), overrides)


def apply_overrides(params: Path, overrides: Sequence[str]) -> None:
    """Write `overrides` into the file `params`. Raises ParamsError for one that does not fit."""
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
    """Return the override with Hydra's `++`, which also sets keys that the file leaves out; unknown keys fail later."""
    return override if override.startswith(("+", "~")) else f"++{override}"
