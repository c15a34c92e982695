"""`peftcore doctor`: rows, findings, and exit status 1 where there is an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app


def doctor(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["doctor", *arguments])


@pytest.fixture
def root(patient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline whose rows are well."""
    well = patient()
    well.tokenizer.save_pretrained(tmp_path / "artifacts" / "base")
    (well.folder / "report.json").write_text(json.dumps(well.report))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("data: {source: rows.jsonl, max_length: 200}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_and_findings_of_data_that_is_well(root: Path) -> None:
    result = doctor("--rows", "2")
    assert result.exit_code == 0
    assert result.stdout.count("supervised · weight 1") == 2
    assert "<|im_end|> supervised in 100.0% of rows" in result.stdout


def test_what_is_left_of_the_demonstration_is_told(root: Path) -> None:
    assert "warning: project.name is the demonstration's, docstrings, but data.source is rows.jsonl" in doctor().stdout
    assert len(json.loads(doctor("--json").stdout)["demonstration"]) == 1


def test_json_is_all_findings(root: Path) -> None:
    findings = json.loads(doctor("--json").stdout)["findings"]
    assert {finding["severity"] for finding in findings} == {"ok"}


def test_json_is_alone_on_stdout_in_a_process_of_its_own(root: Path) -> None:
    """transformers prints to stdout when it is imported and WANDB_MODE is offline."""
    done = subprocess.run(
        [sys.executable, "-m", "flows", "doctor", "--json"], cwd=root, capture_output=True, text=True, check=True
    )
    assert {finding["severity"] for finding in json.loads(done.stdout)["findings"]} == {"ok"}


def test_rewards_are_tried(root: Path) -> None:
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "rewards.py").write_text("def short(prompt, answer, reference, row):\n    return -len(answer)\n")
    grpo = "train: {objective: grpo, grpo: {rewards: [{scorer: 'data/rewards.py:short'}]}}\n"
    (root / "params.yaml").write_text("data: {source: rows.jsonl, max_length: 200}\n" + grpo)
    result = doctor("--rows", "1")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("supervised · weight 1") == 1
    assert "reward short" in result.stdout and "sum of rewards" in result.stdout
    findings = json.loads(doctor("--json").stdout)["findings"]
    assert [finding["severity"] for finding in findings if finding["check"] == "sum of rewards"] == ["warning"]


def test_an_error_is_exit_status_1(root: Path) -> None:
    (root / "params.yaml").write_text("data: {source: rows.jsonl, max_length: 40}\n")
    result = doctor("--json")
    assert result.exit_code == 1
    assert result.stderr == "error: 1 of 14 checks found an error: lengths\n"
    assert json.loads(result.stdout)["findings"]


def test_before_prepare_it_says_what_to_run(root: Path) -> None:
    (root / "artifacts" / "data" / "report.json").unlink()
    result = doctor()
    assert result.exit_code == 1
    assert "run `dvc repro prepare` first" in result.stderr


def test_in_a_folder_of_the_project_the_command_to_run_names_its_pipeline(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "artifacts" / "data" / "report.json").unlink()
    (root / "my rows").mkdir()
    monkeypatch.chdir(root / "my rows")
    assert "run `dvc repro ../dvc.yaml:prepare` first" in doctor().stderr
