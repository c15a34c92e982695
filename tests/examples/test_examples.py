"""Every example runs as its page says: the commands of each README, with small sizes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.project.create import values_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(page.parent.name for page in EXAMPLES.glob("*/README.md"))
SMALL = {
    "python train.py": "python train.py --steps 2 --batch-size 4 --rows 16",
    "python base.py": "python base.py --steps 2",
    "python serve.py": "python serve.py --steps 2",
}
"""Commands of the pages that are shortened, beside `--params ../small.yaml`."""


def script(folder: Path, base: str | None) -> str:
    """Return the commands of an example's page with small sizes, on another base if one is given."""
    page = (folder / "README.md").read_text()
    text = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    option = "" if base is None else f" --base {base}"
    for command, small in SMALL.items():
        text = text.replace(command, f"{small}{option}" if command == "python serve.py" else small)
    return text.replace("--params params.yaml", f"--params params.yaml --params ../small.yaml{option}")


def test_there_are_ten_and_each_is_in_the_list() -> None:
    assert len(FOLDERS) == 10
    listed = re.findall(r"^\| \[(\w+)\]\(\1/README\.md\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_page_is_a_page(folder: str) -> None:
    assert 100 < len((EXAMPLES / folder / "README.md").read_text().split()) < 450


# the method of custom_method is unknown until its package is installed
@pytest.mark.parametrize(
    "file",
    sorted({*EXAMPLES.rglob("*.yaml")} - {*EXAMPLES.glob("custom_method/*")}),
    ids=lambda file: str(file.relative_to(EXAMPLES)),
)
def test_parameters_fit_and_differ_from_the_defaults(file: Path) -> None:
    given = values_of(file)
    defaults: Any = YAML(typ="safe").load(ROOT / "flows" / "project" / "templates" / "params.yaml")
    assert (given and "small" in file.name) or {"project.name", "data.source"} <= given.keys()
    assert given.keys() <= set(_keys(defaults))


def _keys(values: dict[str, Any], before: str = "") -> list[str]:
    inner = [
        name for key, value in values.items() if isinstance(value, dict) for name in _keys(value, f"{before}{key}.")
    ]
    return [*(f"{before}{key}" for key in values), *inner]


@pytest.mark.parametrize(
    "folder", ["docstrings", "classification", "tags", "sequences", "preference", "embeddings", "retraining"]
)
def test_rows_are_made_of_installed_packages(folder: str, examples: Path) -> None:
    made = subprocess.run(
        [sys.executable, "rows.py"], cwd=examples / folder, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    files = sorted((examples / folder / "data").rglob("*.jsonl"))
    assert len(files) == (3 if folder == "retraining" else 1)
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) > 200
        assert all(all(row.values()) for row in rows)


def outcome(home: Path, name: str) -> dict[str, Any]:
    """Return the record of the last run of a project that an example has made in the home folder."""
    return json.loads((home / name / "metrics.json").read_text())


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("folder", "name"),
    [("docstrings", "docstrings"), ("classification", "errors"), ("preference", "faithful")],
)
def test_an_example_of_the_pipeline_runs(
    folder: str, name: str, examples: Path, base_source: str, shell: Callable[..., str], tmp_path: Path
) -> None:
    said = shell(script(examples / folder, base_source), examples / folder)
    assert f"{name} v0.1.0 is champion" in said
    assert outcome(tmp_path / "home", name)["training"]["steps"] >= 1


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("folder", "name"), [("tags", "references"), ("sequences", "names")])
def test_an_example_with_a_small_base_runs(
    folder: str, name: str, examples: Path, shell: Callable[..., str], tmp_path: Path
) -> None:
    said = shell(script(examples / folder, None), examples / folder)
    assert f"{name} v0.1.0 is champion" in said
    assert outcome(tmp_path / "home", name)["training"]["steps"] >= 1


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_the_gguf_base_stays_packed_and_the_adapter_is_exported(
    examples: Path, shell: Callable[..., str], tmp_path: Path
) -> None:
    said = shell(script(examples / "gguf_base", None), examples / "gguf_base")
    assert "packed v0.1.0 is champion" in said
    assert (tmp_path / "home" / "packed" / "packed.gguf").stat().st_size > 1_000_000


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_a_method_of_another_package_goes_through_the_pipeline(
    examples: Path, base_source: str, shell: Callable[..., str], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(site), str(examples / "custom_method")], check=True)
    folder = examples / "custom_method"
    said = shell(script(folder, base_source), folder, PYTHONPATH=f"{ROOT}:{site}")
    assert said.count("merged and loaded again") == 2
    assert "rocoft v0.1.0 is champion" in said
    config = json.loads((tmp_path / "home" / "rocoft" / "artifacts" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ROCOFT"


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_embeddings(examples: Path, shell: Callable[..., str]) -> None:
    assert "search v0.1.0 is champion" in shell(script(examples / "embeddings", None), examples / "embeddings")
    figures = json.loads((examples / "embeddings" / "out" / "figures.json").read_text())
    assert figures["functions"] == 16
    assert all(0 < value <= 1 for side in ("encoder", "adapter") for value in figures[side].values())


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_many_adapters_are_served(examples: Path, base_source: str, shell: Callable[..., str]) -> None:
    shell(script(examples / "many_adapters", base_source), examples / "many_adapters")
    answers = json.loads((examples / "many_adapters" / "out" / "answers.json").read_text())
    assert answers.keys() == {"base", "asyncio", "email", "unittest", "mix"}


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_a_week_of_wrong_rows_is_quarantined(
    examples: Path, base_source: str, shell: Callable[..., str], tmp_path: Path
) -> None:
    shell(script(examples / "retraining", base_source), examples / "retraining")
    history = tmp_path / "home" / "weekly" / "reports" / "retraining" / "history.jsonl"
    second, third = (json.loads(line) for line in history.read_text().splitlines())
    assert {second["outcome"], third["outcome"]} <= {"promoted", "kept"}
    assert (second["quarantined"], third["quarantined"]) == ([], ["week3.jsonl"])
