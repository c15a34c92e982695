"""Forgetting: the loss that an adapter adds on the control set, by its upper bound."""

from collections.abc import Callable
from dataclasses import replace

import pyarrow
from gate_cases import check, control_set, judge, reason

from flows.gate.candidate import Candidate
from flows.gate.checks.forgetting import forgetting
from flows.params import Gate


def test_forgetting_is_judged_by_the_upper_bound(make: Callable[..., Candidate]) -> None:
    candidate = make(control={"rows": 8})
    for change, noise, passed in ((0.05, 0.01, True), (0.2, 0.01, False), (0.05, 0.4, False), (-0.5, 0.01, True)):
        report = judge(replace(candidate, control=control_set(change, noise)), max_forgetting=0.1)
        assert report.passed == passed, (change, noise)
    assert "loss -0.5000 nats against the base on 8 texts of the control set" in check(report, "forgetting")
    assert judge(replace(candidate, control=control_set(5.0)), max_forgetting=None).passed


def test_a_high_confidence_is_not_shown_as_certainty(make: Callable[..., Candidate]) -> None:
    candidate = replace(make(control={"rows": 8}), control=control_set(0.05, 0.01))
    _, detail = forgetting(candidate, Gate.model_validate({"champion": {"confidence": 0.995}}), seed=1)
    assert ", 99.5% upper bound " in detail


def test_what_was_not_measured_is_said_and_what_was_lost_is_refused(make: Callable[..., Candidate]) -> None:
    old = make()
    old = replace(old, metrics={key: value for key, value in old.metrics.items() if key != "control"})
    assert check(judge(old), "forgetting") == "not measured: the version was registered before there were control sets"
    assert "evaluate.control.source is null" in check(judge(make(control=None)), "forgetting")
    assert reason(judge(replace(make(), control=None))).startswith("forgetting: its control.parquet is missing")


def test_an_empty_control_set_is_a_missing_one(make: Callable[..., Candidate]) -> None:
    candidate = replace(make(control={"rows": 8}), control=control_set(0.0).slice(0, 0))
    passed, detail = forgetting(candidate, Gate(max_forgetting=0.1), seed=1)
    assert not passed and detail == "its control.parquet is missing, at most 0.1; run `peftcore run` again"


def test_long_texts_weigh_by_their_tokens(make: Callable[..., Candidate]) -> None:
    """A text of 300 tokens that the adapter reads 0.4 nats worse, and seven of 100 that it reads as before."""
    texts = {"tokens": [300] + [100] * 7, "base_loss": [2.0] * 8, "adapter_loss": [2.4] + [2.0] * 7}
    candidate = replace(make(control={"rows": 8}), control=pyarrow.table(texts))
    _, detail = forgetting(candidate, Gate(), seed=1)
    assert detail.startswith("loss +0.1200 nats against the base on 8 texts")
