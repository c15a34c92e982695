"""Sections `register` and `gate`: limits that null switches off, and names that git and DVC can take."""

from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.params import Gate

LIMITS = (
    "max_test_loss",
    "min_loss_gain",
    "min_rouge_l_gain",
    "min_eos_rate",
    "min_accuracy",
    "max_forgetting",
    "max_new_suite_failures",
    "max_benchmark_drop",
    "max_calibration_error",
    "max_adapter_mb",
    "max_first_token_ms",
    "max_token_ms",
    "max_slowdown",
)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("gate: {champion: {confidence: 1}}", "gate.champion.confidence"),
        ("gate: {champion: {resamples: 99}}", "gate.champion.resamples"),
        ("gate: {champion: {max_loss_regression: -0.1}}", "gate.champion.max_loss_regression"),
        ("gate: {slices: {min_rows: 1}}", "gate.slices.min_rows"),
        ("gate: {sequence: {alpha: 0}}", "gate.sequence.alpha"),
        ("gate: {sequence: {alpha: 1.0}}", "gate.sequence.alpha"),
        ("gate: {sequence: {looks: 0}}", "gate.sequence.looks"),
        ("gate: {sequence: {spending: evenly}}", "gate.sequence.spending"),
        ("gate: {sequence: {scope: rows}}", "gate.sequence.scope"),
        ("gate: {sequence: {alfa: 0.05}}", "gate.sequence.alfa"),
        ("gate: {min_loss_gain: .nan}", "gate.min_loss_gain"),
        ("gate: {min_loss_gain: -.inf}", "gate.min_loss_gain"),
        ("gate: {max_test_loss: 0}", "gate.max_test_loss"),
        ("gate: {min_eos_rate: 90}", "gate.min_eos_rate"),
        ("gate: {min_rouge_l_gain: -1.5}", "gate.min_rouge_l_gain"),
        ("gate: {approvals: -1}", "gate.approvals"),
        ("gate: {stage: No Stage}", "gate.stage"),
        ("gate: {stage: 'a#b'}", "gate.stage"),
        ("register: {remote: --help}", "register.remote"),
        ("register: {git_remote: -u}", "register.git_remote"),
        ("register: {git_remote: 'two words'}", "register.git_remote"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, text).startswith(f"params.yaml:1: {key}: ")


def test_null_switches_each_limit_off(tmp_path: Path) -> None:
    gate = read(tmp_path, f"gate: {{{', '.join(f'{name}: null' for name in LIMITS)}}}").gate
    assert {getattr(gate, name) for name in LIMITS} == {None}
    named = {name for name in Gate.model_fields if name.startswith(("max_", "min_"))}
    assert named == set(LIMITS)


def test_a_gain_may_be_allowed_to_be_a_loss(tmp_path: Path) -> None:
    gate = read(tmp_path, "gate: {min_loss_gain: -0.5, min_rouge_l_gain: -1}").gate
    assert (gate.min_loss_gain, gate.min_rouge_l_gain) == (-0.5, -1.0)


@pytest.mark.parametrize("remote", ["origin", "git@github.com:a/b.git", "https://example.org/a", "../up stream"])
def test_a_git_remote_is_a_name_or_an_address(tmp_path: Path, remote: str) -> None:
    text = f"register: {{git_remote: '{remote}'}}"
    if " " in remote:
        assert "register.git_remote" in refusal(tmp_path, text)
    else:
        assert read(tmp_path, text).register.git_remote == remote


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "{metric: exact_match, limit: 1}",
            "metric: 'exact_match' does not fit; nothing computes it; add the built-in",
        ),
        ("{metric: refnd, limit: 1}", "metric: 'refnd' does not fit; nothing computes it; did you mean refund?"),
        ("{metric: accuracy, limit: 1}", "metric: 'accuracy' does not fit; nothing computes it; give a scorer of "),
        ("{metric: loss, limit: 1}", "direction: 'higher' does not fit; loss is better if lower; give lower"),
        ("{metric: refund}", "metric: 'refund' does not fit; give at least one of limit, gain, bound and slice_bound"),
        ("{metric: refund, limitt: 1}", "limitt: unknown key; did you mean limit?"),
        ("{metric: refund, slice_bound: -1}", "slice_bound: -1 does not fit; give a number of at least 0"),
        ("{metric: words, bound: 1}", "metric: 'words' does not fit; its scorer has on_error: skip"),
    ],
)
def test_a_wrong_rule_is_told_what_fits(tmp_path: Path, rule: str, message: str) -> None:
    scorers = "[data/my.py:refund, {scorer: length, name: words, on_error: skip}]"
    text = refusal(tmp_path, f"evaluate: {{scorers: {scorers}}}\ngate:\n  rules:\n    - {rule}\n")
    assert text.startswith(f"params.yaml:4: gate.rules.0.{message}")


def test_two_rules_on_one_metric_are_refused(tmp_path: Path) -> None:
    rule = "{metric: rouge_l, limit: 0.1}"
    assert refusal(tmp_path, f"gate: {{rules: [{rule}, {rule}]}}").startswith("params.yaml:1: gate.rules.1.metric: ")


def test_a_rule_may_be_on_a_figure_of_the_objective(tmp_path: Path) -> None:
    data = "data: {source: a.jsonl, kind: classification}\ntrain: {objective: classification}\n"
    (rule,) = read(tmp_path, f"{data}gate: {{rules: [{{metric: accuracy, bound: 0}}]}}").gate.rules
    assert rule.compares and rule.direction == "higher"


def test_only_a_limit_may_be_on_the_divergence_and_only_with_a_teacher(tmp_path: Path) -> None:
    teacher = "train: {distillation: {teacher: base}}\n"
    rule = "gate: {rules: [{metric: divergence, direction: lower, RULE: 0.05}]}\n"
    (read_rule,) = read(tmp_path, teacher + rule.replace("RULE", "limit")).gate.rules
    assert not read_rule.compares
    assert "the champion may have another teacher" in refusal(tmp_path, teacher + rule.replace("RULE", "bound"))
    assert "nothing computes it" in refusal(tmp_path, rule.replace("RULE", "limit"))
