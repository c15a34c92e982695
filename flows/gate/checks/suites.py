"""Check of a prompt suite: prompts that fail with the candidate and pass with the champion."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.gate.candidate import Candidate, Champion, CheckResult
from flows.params import Gate
from flows.verdicts import Failure, is_same_suite, suite_failures

SHOWN = 3
"""Maximum number of failures of one kind in the detail; the review page shows all."""
LONGEST = 300
"""Maximum number of characters of a prompt or an answer in the detail."""


def prompt_suite(candidate: Candidate, champion: Champion | None, gate: Gate, name: str) -> CheckResult:
    """Check the number of prompts with a new failure, and show the prompts and answers that fail.

    A failure is a prompt with an assertion. It is new if the champion passes it, and without a champion always.
    """
    result, limit = candidate.suites.get(name), gate.max_new_suite_failures
    if result is None:
        return limit is None, "not measured, no limit set" if limit is None else "not measured; run the pipeline again"
    failures, count = suite_failures(result), len(result["prompts"])
    if not failures:
        return True, f"all {count} prompts pass"
    told = f"{len(failures)} of {count} prompts fail"
    if limit is None:
        return True, f"{told}, no limit set: {_shown(failures)}"
    if champion is None:
        what = f"{told}, at most {limit} without a {gate.stage} to compare with"
        return len(failures) <= limit, f"{what}: {_shown(failures)}"
    if candidate.content is not None and candidate.content == champion.content:
        return True, f"{told}, and it is the adapter of {champion.version}: {_shown(failures)}"
    theirs, how = _of_champion(champion, name, result)
    if theirs is None:
        return False, f"{told}, and {champion.version} {how}, so nothing says which are new: {_shown(failures)}"
    known = frozenset(key for failure in suite_failures(theirs) for key in failure.keys)
    new = [failure for failure in failures if failure.keys - known]
    old = [failure for failure in failures if not failure.keys - known]
    parts = [f"{told}, {len(new)} of them new since {champion.version}, at most {limit}{how}"]
    parts += [f"new: {_shown(new)}"] if new else []
    parts += [f"{champion.version} fails too: {_shown(old)}"] if old else []
    return len(new) <= limit, "; ".join(parts)


def _of_champion(champion: Champion, name: str, ours: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """Return the champion's result of the same suite, and a note; None and the reason if there is none."""
    registered = champion.suites.get(name)
    if is_same_suite(registered, ours):
        return registered, ""
    why = "answered another version of the suite" if registered else "was evaluated without the suite"
    measured = champion.answered_suites
    if measured is None:
        return None, f"{why} (gate.champion.reevaluate is false)"
    if not is_same_suite(measured.get(name), ours):
        return None, f"{why}, and the files of the suite have changed since the candidate's evaluation"
    return measured[name], f" ({champion.version} {why}, so it was re-evaluated)"


def _shown(failures: Sequence[Failure]) -> str:
    shown = [
        f"{one.id} {', '.join(one.assertions)} [prompt: {_cut(one.prompt)}; answer: {_cut(one.answer)}]"
        for one in failures[:SHOWN]
    ]
    more = [f"and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
    return ", ".join([*shown, *more])


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= LONGEST else line[:LONGEST] + "…")
