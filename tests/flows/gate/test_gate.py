"""The gate: its checks in their order, which of them end it, and all that a refusal names. Each check has a file."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from gate_cases import LATENCY, champion_of, control_set, judge, reason, with_merge

from flows.gate.candidate import Candidate, Reevaluation
from flows.gate.gate import COMPARING, DECISIVE, GateReport
from flows.params import Champion as ChampionParams
from flows.params import Slices as SlicesParams

ORDER = [
    "not withdrawn",
    "allowed files",
    "manifest",
    "evidence",
    "evaluation settings",
    "signature",
    "finite weights",
    "test loss",
    "gain in loss",
    "gain in ROUGE-L",
    "EOS rate",
    "against the champion",
    "the champion's rows",
    "slices",
    "forgetting",
    "adapter size",
    "latency",
    "merge fidelity",
    "approval",
]


def test_a_good_candidate_passes_every_check_in_order(make: Callable[..., Candidate]) -> None:
    report = judge(make())
    assert report.passed
    assert report.reason is None
    assert [check.name for check in report.checks] == ORDER


def faulty(make: Callable[..., Candidate], faults: list[str]) -> GateReport:
    """The verdict on a candidate with just these faults, each for the check of its name."""
    gate: dict[str, Any] = {
        "champion": ChampionParams(
            max_loss_regression=0.0 if "against the champion" in faults else 9.0,
            max_loss_regression_on_its_rows=0.1 if "the champion's rows" in faults else 9.0,
        ),
        "slices": SlicesParams(max_loss_regression=0.0 if "slices" in faults else 9.0),
    }
    limits: dict[str, dict[str, Any]] = {
        "signature": {"allowed_signers": "signers"},
        "test loss": {"max_test_loss": 0.1},
        "gain in loss": {"min_loss_gain": 9.0},
        "gain in ROUGE-L": {"min_rouge_l_gain": 1.0},
        "adapter size": {"max_adapter_mb": 1e-6},
        "latency": {"max_token_ms": 0.1},
        "approval": {"approvals": 1},
    }
    for name in faults:
        gate |= limits.get(name, {})
    before = make("v0.1.0", loss=2.2)
    champion = replace(
        champion_of(before),
        evaluation_set="0" * 64,
        reevaluate_champion=lambda: Reevaluation(before.rows, 0),
        reevaluate_candidate=lambda: Reevaluation(candidate.rows, 0),
    )
    candidate = make(
        weight=float("nan") if "finite weights" in faults else 1.0,
        adapter={"loss": 2.7, "rouge_l": 0.3, "ended": 0.5 if "EOS rate" in faults else 1.0},
        control={"rows": 8},
        latency=LATENCY,
    )
    if "allowed files" in faults:
        (candidate.adapter / "adapter_model.bin").write_bytes(b"pickle")
    if "merge fidelity" in faults:
        candidate = with_merge(candidate, {"kl": 9.0, "top1_agreement": 0.0})
    return judge(
        replace(
            candidate,
            files={} if "manifest" in faults else candidate.files,
            evidence=dict.fromkeys(candidate.evidence, "0" * 64) if "evidence" in faults else candidate.evidence,
            unmeasured=("it has no control set",) if "evaluation settings" in faults else (),
            withdrawn="docstrings#champion#2 rolled it back" if "not withdrawn" in faults else None,
            control=control_set(1.0 if "forgetting" in faults else 0.0),
        ),
        champion,
        **gate,
    )


@pytest.mark.parametrize("name", ORDER)
def test_of_all_that_is_wrong_everything_that_can_be_told_is_told(make: Callable[..., Candidate], name: str) -> None:
    report = faulty(make, ORDER[ORDER.index(name) :])
    assert reason(report).startswith(f"{name}: ")
    failed = [check.name for check in report.checks if not check.passed]
    later = ORDER[ORDER.index(name) :]
    if name in DECISIVE:
        assert failed == [name] and report.checks[-1].name == name
    elif name in COMPARING:
        assert failed == [name, *(other for other in later if other not in COMPARING)]
    else:
        assert failed == [other for other in later if other not in COMPARING]
        made = {check.name for check in report.checks}
        assert not COMPARING & made.intersection(later)


@pytest.mark.parametrize("name", ORDER)
def test_each_fault_alone_is_enough(make: Callable[..., Candidate], name: str) -> None:
    assert reason(faulty(make, [name])).startswith(f"{name}: ")


def test_without_a_fault_that_candidate_passes(make: Callable[..., Candidate]) -> None:
    assert faulty(make, []).passed


@pytest.mark.faults("pickle or foreign files")
def test_a_pickle_is_refused_before_anything_is_read(make: Callable[..., Candidate]) -> None:
    candidate = make()
    (candidate.adapter / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    (candidate.adapter / "adapter_model.safetensors").write_bytes(b"not even that")
    report = judge(candidate)
    assert "adapter_model.bin may not be in an adapter folder" in reason(report)
    assert [check.name for check in report.checks] == ORDER[:2]


def test_a_report_survives_json(make: Callable[..., Candidate]) -> None:
    report = judge(make(), min_loss_gain=9.0)
    assert GateReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
