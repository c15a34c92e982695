"""What of the demonstration would follow a user into a task of his own."""

from pathlib import Path
from typing import Any

import pytest

from flows.params import DEMONSTRATION_PROMPT, Params, left_over, load_params
from flows.params.demonstration import LIMITS

ROOT = Path(__file__).parents[3]


def test_the_demonstration_itself_is_not_warned_of() -> None:
    assert left_over(load_params(ROOT / "params.yaml")) == []


def test_with_another_source_alone_all_of_it_is_named(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("source: stdlib:docstrings", "source: data/tickets.jsonl"))
    name, prompt, limits = left_over(load_params(tmp_path / "params.yaml"))
    assert name.startswith("project.name is the demonstration's, docstrings, but data.source is data/tickets.jsonl")
    assert repr(DEMONSTRATION_PROMPT) in prompt and "give your own, or null" in prompt
    assert all(f"{section}.{key}" in limits for section, key in LIMITS)


@pytest.mark.parametrize(
    ("section", "values", "count"),
    [
        ("project", {"name": "tickets"}, 2),
        ("data", {"system_prompt": None}, 2),
        ("data", {"system_prompt": "Be brief."}, 2),
        ("data", {"train_rows": None}, 2),
    ],
)
def test_what_was_said_is_not_named(section: str, values: dict[str, Any], count: int) -> None:
    given: dict[str, Any] = {"data": {"source": "rows.jsonl", "system_prompt": DEMONSTRATION_PROMPT}}
    given[section] = given.get(section, {}) | values
    assert len(left_over(Params.model_validate(given))) == count
