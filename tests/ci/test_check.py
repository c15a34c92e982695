"""`make check` finds the tests that belong to a change, and ends in time."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", ROOT / ".ci" / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path, check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository with one commit on `main` and a branch that starts there."""
    files = {
        "peftcore/kernels/low_rank.py": "",
        "peftcore/adapter.py": "",
        "tests/peftcore/kernels/test_low_rank.py": "",
        "tests/peftcore/test_contract.py": "from peftcore.kernels.low_rank import Factors",
        "tests/peftcore/test_adapter.py": "from peftcore.kernels.low_rankings import x",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (
        ["init", "--quiet", "--initial-branch", "main"],
        ["add", "."],
        [*identity, "commit", "--quiet", "-m", "start"],
        ["switch", "--quiet", "--create", "work"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    return tmp_path


def test_a_change_runs_its_mirror_then_those_that_name_it_then_the_smoke_set(
    check: ModuleType, repository: Path
) -> None:
    assert check.select_tests(check.changed_files(None)) == list(check.SMOKE)
    (repository / "peftcore/kernels/low_rank.py").write_text("x = 1")
    changed = check.changed_files(None)
    assert changed == ["peftcore/kernels/low_rank.py"]
    wanted = ["tests/peftcore/kernels/test_low_rank.py", "tests/peftcore/test_contract.py", *check.SMOKE]
    assert check.select_tests(changed) == wanted


def test_changed_and_new_tests_come_first(check: ModuleType, repository: Path) -> None:
    (repository / "tests/peftcore/test_new.py").write_text("")
    (repository / "peftcore/adapter.py").unlink()
    changed = check.changed_files("HEAD")
    assert changed == ["tests/peftcore/test_new.py"], "a deleted file has nothing to check"
    assert check.select_tests(changed) == ["tests/peftcore/test_new.py", *check.SMOKE]


def test_the_smoke_set_exists(check: ModuleType) -> None:
    assert all((ROOT / name).is_file() for name in check.SMOKE)


def test_the_mirror_of_a_private_module(check: ModuleType) -> None:
    assert check.mirror("peftcore/files/tensors.py") == "tests/peftcore/files/test_tensors.py"
    assert check.mirror("flows/__main__.py") == "tests/flows/test_main.py"


def test_tests_after_the_end_are_skipped_and_counted(check: ModuleType) -> None:
    check.Deadline(60).pytest_runtest_setup()
    late = check.Deadline(-1)
    with pytest.raises(pytest.skip.Exception):
        late.pytest_runtest_setup()
    assert late.skipped == 1
