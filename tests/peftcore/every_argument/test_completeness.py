"""No argument of the public API is ignored: each has an effect, or a warning or an error says why not.

Each test of this folder varies the arguments that its `@checks` names, and asserts a difference. A new argument without
a test fails
`test_every_argument_is_varied_by_a_test`.
"""

import importlib.util
from pathlib import Path

import pytest
from argument_checks import CHECKED, arguments_of, public_functions


@pytest.fixture(scope="module", autouse=True)
def every_test_file() -> None:
    """Import the files beside this one, whose `@checks` fill the record."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"arguments_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        if path != Path(__file__):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_argument_is_varied_by_a_test() -> None:
    unchecked = {
        f"{name}({argument})"
        for name, function in public_functions().items()
        for argument in arguments_of(function) - CHECKED.get(name, set())
    }
    assert not unchecked
    gone = {name: left for name, arguments in CHECKED.items() if (left := arguments - _known(name))}
    assert not gone, "tests name arguments that no function has"


def _known(name: str) -> set[str]:
    function = public_functions().get(name)
    return set() if function is None else arguments_of(function)
