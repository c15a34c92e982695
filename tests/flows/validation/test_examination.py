"""All checks of a kind are well on healthy rows, and a template that cannot be used is an error rather than a crash."""

from typing import Any

import pytest

from flows.errors import StageError
from flows.validation.examination import CHECKS


@pytest.mark.parametrize("kind", list(CHECKS))
def test_healthy_rows_are_well(patient: Any, kind: str) -> None:
    findings = patient(kind).examine()
    assert [str(finding) for finding in findings.of("error", "warning")] == []
    assert len(findings.findings) == len(CHECKS[kind])


def test_a_template_without_an_end_is_a_finding(patient: Any) -> None:
    ill = patient()
    ill.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert [finding.check for finding in ill.examine().of("error")] == ["end of turns"]


def test_rows_of_another_kind_are_refused(patient: Any) -> None:
    ill = patient("chat")
    ill.data = ill.data.model_copy(update={"kind": "preference"})
    with pytest.raises(StageError, match=r"lacks a column .*chosen.*run `peftcore stage prepare` again"):
        ill.examine()
