"""Check of the judge's verdicts: the lower bound of the candidate's win rate against the champion."""

from collections.abc import Mapping
from typing import Any

from flows.errors import GateError
from flows.gate.candidate import AnswerPair, Candidate, Champion, CheckResult, ResultWithFigures
from flows.gate.checks.champion import is_same_adapter, metric_rows
from flows.gate.sequence import percent
from flows.params import Gate


def judged(candidate: Candidate, champion: Champion | None, gate: Gate) -> CheckResult | ResultWithFigures:
    """Check that the lower bound of the win rate is above 0.5 - `gate.judge.margin`.

    The third value, if there is one, holds the figures of the comparison.
    """
    if champion is None:
        return True, f"no {gate.stage} yet"
    if is_same_adapter(candidate, champion):
        return True, f"it is the adapter of {champion.version}"
    if champion.judge_answers is None:
        return False, "the answers were not judged"
    try:
        pairs, how = _pairs(candidate, champion)
    except GateError as error:
        return False, str(error)
    if not pairs:
        return False, f"no prompt has answers of both versions{how}"
    figures = champion.judge_answers(pairs)
    least = 0.5 - gate.judge.margin
    all_equal = figures["equal"] == figures["prompts"]
    passed = all_equal or figures["lower_bound"] > least
    return passed, f"{_in_words(figures, champion.version, gate, least)}{how}", figures


def _pairs(candidate: Candidate, champion: Champion) -> tuple[list[AnswerPair], str]:
    """Return the answers to the prompts that both versions answered, and a note.

    Raises:
        GateError: the champion has no such answers, and may not be re-evaluated.
    """
    ours, theirs, how = metric_rows(candidate, champion, "rouge_l")  # each answer has one
    texts = [
        {name: text for name, text in zip(*columns, strict=True) if text is not None}
        for columns in ([table["id"].to_pylist(), table["adapter_answer"].to_pylist()] for table in (ours, theirs))
    ]
    references = dict(zip(*(candidate.rows[name].to_pylist() for name in ("id", "reference")), strict=True))
    return [
        AnswerPair(name, references[name] or "", text, texts[1][name])
        for name, text in texts[0].items()
        if name in texts[1]
    ], how


def _in_words(figures: Mapping[str, Any], champion: str, gate: Gate, least: float) -> str:
    judge, counts = gate.judge, f"{figures['won']} won, {figures['lost']} lost"
    if figures["unreadable"]:
        counts += f", {figures['unreadable']} without a readable verdict (they count as lost)"
    counts += f", {figures['tied']} tied, {figures['equal']} with equal answers"
    rate = "no prompt was decided" if figures["win_rate"] is None else f"win rate {figures['win_rate']:.3f}"
    bias = "no answer was chosen"
    if figures["first_chosen"] is not None:
        bias = f"the first answer got {figures['first_chosen']:.0%} of the choices (50% without bias)"
    return (
        f"{judge.model or judge.callable} compared {figures['prompts']} answers with those of {champion} in both "
        f"orders: {counts}; {rate}, {percent(judge.confidence)} lower bound {figures['lower_bound']:.3f}, to be above "
        f"{least:g} (sign test p {figures['p_value']:.4f}); position bias: {bias}, {figures['always_first']} prompts "
        f"always the first one and {figures['always_second']} always the second"
    )
