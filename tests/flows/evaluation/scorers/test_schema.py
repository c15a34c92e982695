"""Answers in JSON against a schema."""

import json
import sys
from pathlib import Path

import pytest

from flows.errors import StageError
from flows.evaluation.scorers.schema import json_schema

TICKET = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"city": "Oslo"}', 1),
        ('Sure:\n```json\n{"city": "Oslo"}\n```', 1),
        ('{"city": 3}', 0),
        ("{}", 0),
        ('{"city": "Oslo"', 0),
        ("[" * 100_000, 0),
    ],
)
def test_an_answer_fits_or_not(answer: str, expected: float) -> None:
    assert json_schema(schema=TICKET)("", answer, "", {}) == expected


def test_a_schema_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ticket.json"
    file.write_text(json.dumps(TICKET))
    assert json_schema(schema=str(file))("", '{"city": "Oslo"}', "", {}) == 1


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="schema is no JSON schema"):
        json_schema(schema={"type": "objekt"})


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema.exceptions", None)
    with pytest.raises(StageError, match=r"needs jsonschema .*pip install 'peftcore\[scorers\]'"):
        json_schema(schema=TICKET)
