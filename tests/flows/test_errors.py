"""The exit status of each error, as the help of `peftcore` promises it."""

import inspect
import re

import pytest

from flows import cli, errors
from flows.errors import BusyError, GateError, PipelineError, RegistryConflict, RegistryError

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__]
PROMISED = {int(number): words for number, words in re.findall(r"(\d+) ([^;]+)", cli.app.info.epilog or "")}
"""{exit status: its words in the help}"""


@pytest.mark.parametrize("error", CLASSES)
def test_each_error_is_caught_as_one_of_the_pipeline_and_its_status_is_promised(error: type[PipelineError]) -> None:
    assert issubclass(error, PipelineError)
    assert error.status in PROMISED


def test_a_script_can_tell_a_refusal_and_a_conflict_from_a_failure() -> None:
    assert {one for one in CLASSES if one.status != PipelineError.status} == {GateError, RegistryConflict, BusyError}
    assert "refuses" in PROMISED[GateError.status]
    assert PROMISED[RegistryConflict.status] == PROMISED[BusyError.status]
    assert PROMISED[BusyError.status].startswith("conflict or busy")
    assert "failed" in PROMISED[PipelineError.status]


def test_a_conflict_is_an_error_of_the_registry_too() -> None:
    """Who only wants to know that registering failed need not know of conflicts."""
    with pytest.raises(RegistryError, match="faster"):
        raise RegistryConflict("another writer was faster")
