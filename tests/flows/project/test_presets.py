"""Each preset is a valid params.yaml without a trace of the demonstration."""

from pathlib import Path

import pytest

from flows.params import left_over, load_params
from flows.params.params import Params
from flows.project.create import NewProject, params_text
from flows.project.presets import HARDWARE, TASKS, Hardware, Task, preset


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("task", TASKS)
def test_a_preset_fits_params_yaml(task: Task, hardware: Hardware, tmp_path: Path) -> None:
    text = params_text(NewProject("tickets", "data/rows.jsonl", "hub:ORG/NAME", task, hardware))
    (tmp_path / "params.yaml").write_text(text)
    params = load_params(tmp_path / "params.yaml")
    assert left_over(params) == []
    assert "docstrings" not in text.replace("stdlib:docstrings", "")
    assert (params.project.name, params.base.source, params.data.source) == (
        "tickets",
        "hub:ORG/NAME",
        "data/rows.jsonl",
    )
    for key, value in preset(task, hardware).items():
        section, *path = key.split(".")
        found = getattr(params, section)
        for name in path:
            found = getattr(found, name)
        assert found == value, key


def test_the_shipped_params_yaml_names_every_section() -> None:
    """DVC refuses a stage whose parameter is missing from the file."""
    text = params_text(NewProject("tickets", "x", "hub:ORG/NAME", "chat", "cpu"))
    assert all(f"\n{section}:" in text for section in Params.model_fields)
