"""Counting the tests of another repository that pass with either library: on a repository of five tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hf_peft_models import DATA, MODELS
from benchmarks.hf_peft_tests import cause
from benchmarks.hf_peft_tests_side import compares_words, imports_of, read, stand_in

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest
from torch import nn
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.arrow import check_loaded_lora_compatibility_arrow
from peft.utils import infer_device

from .testing_common import CASES

@pytest.mark.parametrize("options", CASES)
def test_both(options):
    assert LoraConfig(**options).r == 2

def test_words():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["x"]))

def test_words_by_itself(recwarn):
    with pytest.raises(ValueError) as error:
        LoraConfig(layers_pattern="x")
    assert "must also be specified" in str(error) and "must also be specified" in str(error.value)
    LoraConfig(eva_config=EvaConfig())
    assert recwarn.list[0].message.args[0].startswith("`eva_config` specified")
    assert any("will be ignored" in str(warning.message) for warning in recwarn)
    assert len(recwarn) == 1 and not any("?" in str(warning.message) for warning in recwarn.list[1:])

def test_a_private_name():
    assert not isinstance(check_loaded_lora_compatibility_arrow, type)

def test_neither():
    assert LoraConfig().r == 3
"""


def test_a_stand_in_can_be_made_and_not_used() -> None:
    config = stand_in("PrivateConfig")(rank=2)
    assert config.rank == 2
    with pytest.raises(Exception, match=r"PrivateConfig is not in peftcore \(its peft_type was read\)"):
        _ = config.peft_type


def test_imports_are_found_in_functions_too(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import peft.utils\nfrom .peft import x\ndef f():\n    from peft.tuners import lora, vera\n")
    assert list(imports_of(file)) == [("peft.utils", None), ("peft.tuners", "lora"), ("peft.tuners", "vera")]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"id": "a"}\n{"id": ')
    assert read(file) == [{"id": "a"}]


def test_a_cause_holds_no_text_of_the_test() -> None:
    line = {"id": "tests/a.py::T::test_x[1]", "outcome": "failed", "type": "AssertionError", "message": "assert secret"}
    assert cause(line) == "AssertionError in test_x"
    ours = line | {"type": "ConfigError", "message": "r must be 3, got 'x'", "raised": "peftcore/config.py:3 check"}
    assert cause(ours) == "ConfigError: r must be …, got …"


def test_a_test_without_an_outcome_was_not_collected() -> None:
    assert cause(None) == "not collected"


def test_only_tests_that_compare_words_by_themselves_run_again() -> None:
    failed = {"type": "AssertionError", "message": "assert 'x' in \"<ExceptionInfo E('y')>\""}
    assert compares_words(failed, [])
    assert compares_words({"type": "AssertionError", "message": "assert False"}, ["recwarn"])
    assert compares_words({"type": "AssertionError", "message": "assert 'already merged' in 'adapter a is merged'"}, [])
    assert not compares_words({"type": "AssertionError", "message": "assert 'a' in {'b'}"}, [])
    assert not compares_words({"type": "AssertionError", "message": "assert 1 == 2"}, ["tmp_path"])
    assert not compares_words({"type": "ConfigError", "message": "ExceptionInfo"}, ["recwarn"])
    assert not compares_words({}, ["recwarn"])


@pytest.mark.proof
def test_a_repository_is_counted(tmp_path: Path) -> None:
    checkout, cells = tmp_path / "checkout", tmp_path / "cells"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "tests" / "__init__.py").write_text("")
    (checkout / "tests" / "testing_common.py").write_text("CASES = [{'r': 2}]")
    (checkout / "tests" / "test_some.py").write_text(TESTS)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "tests"]):
        subprocess.run([*git, *arguments], check=True)
    for name in MODELS:  # no stand-in is needed
        main = cells / "hub" / f"models--{name.replace('/', '--')}" / "refs" / "main"
        main.parent.mkdir(parents=True)
        main.touch()
    for name in DATA:
        (cells / "hub" / "datasets" / name.replace("/", "___")).mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.hf_peft_tests", str(checkout), "--jobs", "2"]
    command += ["--cells", str(cells), "--folder", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "out" / "hf_peft_tests.json").read_text())["rows"]
    counts = {key: row[key] for key in ("collected", "run", "passed_with_both", "other_wording")}
    assert counts == {"collected": 5, "run": 5, "passed_with_both": 3, "other_wording": 2}
    assert (tmp_path / "out" / "hf_peft_tests.md").read_text().count("| test_some |") == 1
