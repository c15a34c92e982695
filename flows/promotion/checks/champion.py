"""The candidate beside the champion, row by row: on all test rows, and in each slice of them.

A champion that was measured on other test rows is measured again on the candidate's, but for those that it has itself
been trained or validated on; an adapter of another base, or of another loss, cannot be compared.
"""

from typing import TYPE_CHECKING

from flows.errors import GateError
from flows.params import Gate
from flows.promotion.candidate import Candidate, Champion, Outcome

if TYPE_CHECKING:
    import pyarrow

TOKENS = "cross entropy of tokens"
"""The test loss of a run that does not say what it is."""


def against_the_champion(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    from flows.promotion.bootstrap import in_words, paired_bootstrap, paired_losses

    if champion is None:
        return True, f"no {gate.stage} yet"
    refusal = _not_comparable(candidate, champion, gate)
    if refusal:
        return False, refusal
    try:
        theirs, how = _rows(candidate, champion)
    except GateError as error:
        return False, str(error)
    weights, ours, theirs_there, _ = paired_losses(candidate.rows, theirs)
    if len(weights) == 0:
        return False, (
            f"{champion.version} was measured on other test rows{how}; evaluate both on rows that it has not seen, or "
            f"{_free(candidate, champion, gate)}"
        )
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, ours, theirs_there, rule.confidence, rule.resamples, seed)
    return upper < rule.max_loss_regression, (
        f"loss {mean:+.4f} nats against {champion.version} on {len(weights)} rows, {rule.confidence:.0%} upper "
        f"bound {in_words(upper, f'to be below {rule.max_loss_regression:g}')}{how}"
    )


def slices(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    from flows.promotion.slices import slice_differences

    rule = gate.slices
    if champion is None:
        return True, f"no {gate.stage} yet"
    if rule.max_loss_regression is None:
        return True, "no limit set"
    allowed = f"at most {rule.max_loss_regression:g}"
    found = slice_differences(candidate.rows, _rows(candidate, champion)[0], rule, gate.champion.resamples, seed)
    worse = [one for one in found if one.is_worse]
    if worse:
        told = "; ".join(f"{one.name} {one.mean:+.3f} nats on {one.rows} rows (p {one.p:.4f})" for one in worse[:3])
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        return False, f"worse than {champion.version} in {told}{more}, {allowed}"
    largest = max(found, key=lambda one: one.mean)
    return True, (
        f"none of {len(found)} worse than allowed; the largest difference is {largest.name} {largest.mean:+.3f} nats "
        f"on {largest.rows} rows, {allowed}"
    )


def _not_comparable(candidate: Candidate, champion: Champion, gate: Gate) -> str | None:
    losses = [loss or TOKENS for loss in (candidate.metrics.get("loss_function"), champion.loss_function)]
    if candidate.metrics["base_model"] != champion.base_model:
        what = "base model"
    elif losses[0] != losses[1]:
        return (
            f"its test loss is {losses[0]}, and that of {champion.version} is {losses[1]}, so the two cannot be "
            f"compared; {_free(candidate, champion, gate)}"
        )
    elif _has_other_rows(candidate, champion) and champion.measure_again is None:
        what = "test set"
    else:
        return None
    return (
        f"{champion.version} was measured on another {what}, so the two cannot be compared; run the "
        f"champion's parameters on this {what} first, or {_free(candidate, champion, gate)}"
    )


def _free(candidate: Candidate, champion: Champion, gate: Gate) -> str:
    return f"free the stage with `gto deprecate {candidate.name} {champion.version} {gate.stage}`"


def _has_other_rows(candidate: Candidate, champion: Champion) -> bool:
    return candidate.metrics["evaluation_set"] != champion.evaluation_set


def _rows(candidate: Candidate, champion: Champion) -> "tuple[pyarrow.Table, str]":
    """The champion's losses to compare with, and how they were found where that was not when it was evaluated."""
    again = champion.again if _has_other_rows(candidate, champion) else None
    if again is None:
        return champion.rows, ""
    left_out = "none of them" if again.left_out == 0 else str(again.left_out)
    return again.rows, (
        f"; {champion.version} was measured again on these {again.rows.num_rows + again.left_out} test rows, and "
        f"{left_out} left out that it had been trained or validated on"
    )
