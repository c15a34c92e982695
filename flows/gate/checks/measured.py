"""Whether a version was measured as the rules ask.

The rules are the gate's limits and the parameters that say what is measured for them. They are those of whoever judges,
in CI the protected branch's. The judged version was evaluated by its own parameters, which its author chose: without a
control set it would pass the limit on forgetting, and without slices that on slices.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from flows.gate.candidate import Candidate, Outcome
from flows.params import Params


def measured_as_asked(candidate: Candidate) -> Outcome:
    if candidate.unmeasured:
        return False, (
            f"{'; '.join(candidate.unmeasured)}; evaluate it as the rules ask (`peftcore run`), or change the rules "
            "where they are kept"
        )
    return True, "with the objective, rows, slices and control set of the rules"


def unmeasured(record: Mapping[str, Any], metrics: Mapping[str, Any], rules: Params) -> Iterator[str]:
    """What the rules ask for and the version was not measured by, in words. record: its lineage record."""
    theirs = record["params"]
    objective = theirs["train"].get("objective", "sft")
    if objective != rules.train.objective:
        yield _differs("train.objective", objective, rules.train.objective)
    yield from _rows(theirs, rules)
    data = theirs["data"]
    if rules.gate.slices.max_loss_regression is not None and data.get("slice_column") != rules.data.slice_column:
        yield _differs("data.slice_column", data.get("slice_column"), rules.data.slice_column)
    yield from _leakage(data, rules)
    yield from _control(theirs, metrics, rules)


def _rows(theirs: Mapping[str, Any], rules: Params) -> Iterator[str]:
    """Rows by which something is measured, of which there have to be as many; null is all there are."""
    asked = {
        "data.test_rows": rules.data.test_rows,
        "evaluate.rows": rules.evaluate.rows,
        "evaluate.generate_rows": rules.evaluate.generate_rows,
        "merge.rows": rules.merge.rows,
    }
    for key, least in asked.items():
        section, _, name = key.partition(".")
        given = theirs.get(section, {}).get(name, least)
        if (math.inf if given is None else given) < (math.inf if least is None else least):
            yield _differs(key, given, least, "at least ")


def _leakage(data: Mapping[str, Any], rules: Params) -> Iterator[str]:
    """Test rows that are like training rows flatter a candidate."""
    if rules.data.near_duplicates == "drop" and data.get("near_duplicates", "drop") != "drop":
        yield _differs("data.near_duplicates", data["near_duplicates"], "drop")
    for key in ("similarity", "max_leakage"):
        given, most = data.get(key), getattr(rules.data, key)
        if given is not None and given > most:
            yield _differs(f"data.{key}", given, most, "at most ")


def _control(theirs: Mapping[str, Any], metrics: Mapping[str, Any], rules: Params) -> Iterator[str]:
    asked = rules.evaluate.control
    if rules.gate.max_forgetting is None or asked.source is None or rules.train.objective == "classification":
        return
    given = theirs.get("evaluate", {}).get("control") or {}
    if given.get("source") != asked.source:
        yield _differs("evaluate.control.source", given.get("source"), asked.source)
    elif metrics.get("control") is None:
        yield f"it has no losses on the control set {asked.source}"
    for key in ("rows", "max_length"):
        if given.get("source") == asked.source and given.get(key, math.inf) < getattr(asked, key):
            yield _differs(f"evaluate.control.{key}", given[key], getattr(asked, key), "at least ")


def _differs(key: str, given: Any, asked: Any, how: str = "") -> str:
    told = ["null" if value is None else value for value in (given, asked)]
    return f"it was evaluated with {key} {told[0]}, and the rules have {how}{told[1]}"
