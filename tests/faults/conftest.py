"""The faults suite: trials are counted as they are made, and summed up in a table at the end.

A test makes trials with the fixture `fault`; one elsewhere is counted by `@pytest.mark.faults(ROW, trials=N)`. Rows are
those of `fault_table.PROMISES`. `--faults-report FILE` writes the table as Markdown too. PEFTCORE_FAULTS multiplies the
trials that come in rounds (1 if it is not set).
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fault_table import PROMISES, Tally, as_markdown, tallied
from stage_nursery import Nursery

TESTS = Path(__file__).parents[1]
SCALE = int(os.environ.get("PEFTCORE_FAULTS", "1"))
TRIALS, MARKED = "fault trials", "fault marked"

Trial = Callable[[str], AbstractContextManager[None]]


def _fixtures_of_flows() -> Any:
    """The fixtures that tests/flows has for its own tests."""
    spec = importlib.util.spec_from_file_location("fixtures_of_flows", TESTS / "flows" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_flows = _fixtures_of_flows()
isolated_git, forked_dvc = _flows.isolated_git, _flows.forked_dvc
project, template, registered, registered_template = (
    _flows.project, _flows.template, _flows.registered, _flows.registered_template
)  # fmt: skip
tiny_params, prepared, prepared_template = _flows.tiny_params, _flows.prepared, _flows.prepared_template


# -- what tests use ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Trial:
    """`with fault(ROW): ...` is one trial of that row; it is lost if an assertion or anything else fails in it."""

    @contextmanager
    def trial(row: str) -> Iterator[None]:
        tally = trials.setdefault(row, [0, 0])
        assert row in PROMISES, f"{row!r} is no row of fault_table.PROMISES"
        tally[0] += 1
        yield
        tally[1] += 1

    trials: dict[str, list[int]] = {}
    request.node.user_properties.append((TRIALS, trials))
    return trial


@pytest.fixture
def rounds() -> int:
    """How often to repeat what happens at random moments."""
    return SCALE


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """What stages are forked from."""
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], Path]]:
    """`small_disk(folder, bytes)`: a file system of that size, mounted there until the test ends."""
    mounted: list[Path] = []

    def mount(folder: Path, size: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], Path]]:
    """`read_only(folder)`: nothing in it can be written until the test ends, not even by root."""
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        _mount("--bind", str(folder), str(folder))
        mounted.append(folder)
        _mount("-o", "remount,bind,ro", str(folder))
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


# -- the table ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", metavar="FILE", help="Write the table of faults there, as Markdown.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS / "faults"):
            item.add_marker("faults")  # to be chosen by; its trials are counted by the fixture
            continue
        for marker in item.iter_markers("faults"):
            (row,) = marker.args
            assert row in PROMISES, f"{item.nodeid}: {row!r} is no row of fault_table.PROMISES"
            item.user_properties.append((MARKED, (row, marker.kwargs.get("trials", 1))))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    table = tallied(count for report in reports if report.when == "call" for count in _counts(report))
    if not any(tally.tried for tally in table.values()):
        return
    terminalreporter.section("faults")
    _print(terminalreporter, table)
    target = config.getoption("--faults-report", default=None)
    if target:
        Path(target).write_text(as_markdown(table))


def _counts(report: pytest.TestReport) -> Iterator[tuple[str, int, int]]:
    for name, value in report.user_properties:
        if name == TRIALS:
            yield from ((row, tried, recovered) for row, (tried, recovered) in value.items())
        elif name == MARKED:
            row, trials = value
            yield row, trials, trials if report.passed else trials - 1


def _print(terminalreporter: Any, table: dict[str, Tally]) -> None:
    width = max(map(len, PROMISES))
    terminalreporter.write_line(f"{'fault':{width}}  tried   lost  recovered  promise")
    for row, tally in table.items():
        figures = f"{tally.tried:5}  {tally.lost:5}  {tally.recovered:9}"
        terminalreporter.write_line(f"{row:{width}}  {figures}  {PROMISES[row]}", red=tally.lost > 0)
