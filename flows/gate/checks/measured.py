"""Check that a version was evaluated with the settings that the rules require.

The rules are the gate's limits, and the parameters of the evaluation that these limits refer to. The rules come from
the repository that runs the gate; in CI from the protected branch. A version is evaluated with its own parameters,
which its author chose. An evaluation without a control set would pass the limit on forgetting, and one without slices
the limit on slices.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.gate.candidate import Candidate, CheckResult
from flows.params import Params, load_suites
from flows.params.train import WITHOUT_CHAT
from flows.verdicts import is_same_suite


def evaluation_settings(candidate: Candidate) -> CheckResult:
    """Check that no setting of the evaluation is easier to pass than the rules; stricter settings are allowed."""
    if candidate.unmeasured:
        return False, (
            f"{'; '.join(candidate.unmeasured)}; evaluate it by the rules (`peftcore run`), or change the rules "
            "on the branch that they come from"
        )
    return True, "with the objective, rows, slices and control set of the rules"


def unmeasured(record: Mapping[str, Any], metrics: Mapping[str, Any], rules: Params, root: Path) -> Iterator[str]:
    """Yield the differences between the evaluation's settings and the rules, in words.

    Args:
        record: the version's lineage record.
        metrics: the version's evaluation metrics.
        rules: the parameters to judge by.
        root: the repository, with the files of the scorers.
    """
    settings = record["params"]
    objective = settings["train"].get("objective", "sft")
    if objective != rules.train.objective:
        yield _differs("train.objective", objective, rules.train.objective)
    yield from _rows(settings, rules)
    data = settings["data"]
    if rules.gate.slices.max_loss_regression is not None and data.get("slice_column") != rules.data.slice_column:
        yield _differs("data.slice_column", data.get("slice_column"), rules.data.slice_column)
    yield from _leakage(data, rules)
    yield from _control(settings, metrics, rules)
    yield from _scorers(metrics, rules, root)
    yield from _suites(metrics, rules, root)
    yield from _benchmarks(metrics, rules, root)


def _rows(settings: Mapping[str, Any], rules: Params) -> Iterator[str]:
    """Compare the numbers of rows, of which there may be more than required; null means all rows."""
    required = {
        "data.test_rows": rules.data.test_rows,
        "evaluate.rows": rules.evaluate.rows,
        "evaluate.generate_rows": rules.evaluate.generate_rows,
        "merge.rows": rules.merge.rows,
    }
    if rules.gate.max_calibration_error is not None:
        required["evaluate.calibration_rows"] = rules.evaluate.calibration_rows
    for key, least in required.items():
        section, _, name = key.partition(".")
        value = settings.get(section, {}).get(name, least)
        if (math.inf if value is None else value) < (math.inf if least is None else least):
            yield _differs(key, value, least, "at least ")


def _leakage(data: Mapping[str, Any], rules: Params) -> Iterator[str]:
    """Compare the leakage limits: test rows that resemble training rows flatter a candidate."""
    if rules.data.near_duplicates == "drop" and data.get("near_duplicates", "drop") != "drop":
        yield _differs("data.near_duplicates", data["near_duplicates"], "drop")
    for key in ("similarity", "max_leakage"):
        value, most = data.get(key), getattr(rules.data, key)
        if value is not None and value > most:
            yield _differs(f"data.{key}", value, most, "at most ")


def _control(settings: Mapping[str, Any], metrics: Mapping[str, Any], rules: Params) -> Iterator[str]:
    required = rules.evaluate.control
    if rules.gate.max_forgetting is None or required.source is None or rules.train.objective in WITHOUT_CHAT:
        return
    control = settings.get("evaluate", {}).get("control") or {}
    if control.get("source") != required.source:
        yield _differs("evaluate.control.source", control.get("source"), required.source)
    elif metrics.get("control") is None:
        yield f"it has no losses on the control set {required.source}"
    for key in ("rows", "max_length"):
        if control.get("source") == required.source and control.get(key, math.inf) < getattr(required, key):
            yield _differs(f"evaluate.control.{key}", control[key], getattr(required, key), "at least ")


def _scorers(metrics: Mapping[str, Any], rules: Params, root: Path) -> Iterator[str]:
    """Compare the scorers that `gate.rules` need: function, options, files and policy."""
    needed = {rule.metric for rule in rules.gate.rules}
    for scorer in rules.scorers:
        if scorer.name not in needed:
            continue
        measured = (metrics.get("scorers") or {}).get(scorer.name)
        if measured is None:
            yield f"it was evaluated without the scorer {scorer.name} of the rules"
            continue
        for key, value in scorer.identity(root).items():
            if measured.get(key) != value:
                yield _differs(f"{key} of the scorer {scorer.name}", measured.get(key), value)


def _suites(metrics: Mapping[str, Any], rules: Params, root: Path) -> Iterator[str]:
    """Compare the prompt suites of the rules: content, settings and files."""
    if rules.gate.max_new_suite_failures is None:
        return
    for name, suite in load_suites(rules.evaluate, rules.data.system_prompt, root).items():
        measured = (metrics.get("suites") or {}).get(name)
        if measured is None:
            yield f"it was evaluated without the suite {name} of the rules"
        elif not is_same_suite(measured, suite.identity(root)):
            yield f"it was evaluated with other prompts, settings or files of the suite {name} than the rules have"


def _benchmarks(metrics: Mapping[str, Any], rules: Params, root: Path) -> Iterator[str]:
    """Compare the benchmarks of the rules: task, settings and files."""
    if rules.gate.max_benchmark_drop is None:
        return
    for benchmark in rules.evaluate.benchmarks:
        measured = (metrics.get("benchmarks") or {}).get(benchmark.name)
        if measured is None:
            yield f"it was evaluated without the benchmark {benchmark.name} of the rules"
        elif measured["identity"] != benchmark.identity(root):
            yield f"it was evaluated with another form of the benchmark {benchmark.name} than the rules have"


def _differs(key: str, value: Any, required: Any, how: str = "") -> str:
    words = ["null" if one is None else one for one in (value, required)]
    return f"it was evaluated with {key} {words[0]}, and the rules have {how}{words[1]}"
