"""The candidate beside the champion, row by row: on its own test rows, on the champion's, and in each slice.

A champion that was measured on other test rows is measured again on the candidate's, and the candidate on the
champion's, but for rows that a version has itself been trained or validated on. An adapter of another base, or of
another loss, cannot be compared.

Figures of the same rows can differ by the hardware and the software that they were found with. What that comes to is
seen by the base, which is the same: where its own losses differ between the two evaluations, both are measured again.
"""

from typing import TYPE_CHECKING

from flows.base.identity import have_same_base
from flows.errors import GateError
from flows.gate.candidate import Candidate, Champion, Outcome
from flows.params import Gate

if TYPE_CHECKING:
    import pyarrow

TOKENS = "cross entropy of tokens"
"""The test loss of a run that does not say what it is."""
FEWEST = 20
"""Rows of the champion that the candidate has not learned; with fewer, those that it has learned are taken as well."""
SAME_CONDITIONS = 0.01
"""Mean difference (nats per token, absolute by row) of the base's losses up to which two evaluations are comparable.
It is chosen to be well below the gains that adapters are promoted for."""


def against_the_champion(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    from flows.gate.bootstrap import in_words, paired_bootstrap, paired_losses

    if champion is None:
        return True, f"no {gate.stage} yet{_looks(candidate)}"
    refusal = _not_comparable(candidate, champion, gate)
    if refusal:
        return False, refusal
    if _is_same_adapter(candidate, champion):
        return _evaluated_again(candidate, champion, gate)
    try:
        own, theirs, how = _rows(candidate, champion)
    except GateError as error:
        return False, str(error)
    weights, ours, theirs_there, _ = paired_losses(own, theirs)
    if len(weights) == 0:
        return False, (
            f"{champion.version} was measured on other test rows{how}; evaluate both on rows that it has not seen, or "
            f"{_free(candidate, champion, gate)}"
        )
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, ours, theirs_there, rule.confidence, rule.resamples, seed)
    return upper < rule.max_loss_regression, (
        f"loss {mean:+.4f} nats against {champion.version} on {len(weights)} rows, {rule.confidence:.0%} upper "
        f"bound {in_words(upper, f'to be below {rule.max_loss_regression:g}')}{how}{_looks(candidate)}"
    )


def on_the_champions_rows(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    """Check that the candidate is not worse, beyond a margin, on the rows that the champion was registered with.

    Whoever chooses the data chooses the test rows, so a better loss on the candidate's own rows may be that of another
    task. Somebody other than who registered the candidate can vouch for it by an approval.
    """
    from flows.gate.bootstrap import in_words, paired_bootstrap, paired_losses

    if champion is None:
        return True, f"no {gate.stage} yet"
    if not _has_other_rows(candidate, champion):
        return True, "they are the candidate's own"
    limit = gate.champion.max_loss_regression_on_its_rows
    if limit is None:
        return True, "no limit set"
    there = champion.candidate_there
    if there is None:
        return False, f"it was not measured on those of {champion.version}"
    few = there.rows.num_rows < FEWEST and there.all_rows is not None
    table = there.all_rows if few and there.all_rows is not None else there.rows
    weights, theirs, ours, _ = paired_losses(champion.rows, table)
    if len(weights) == 0:
        return False, f"no row of {champion.version} was measured; {_free(candidate, champion, gate)}"
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, ours, theirs, rule.confidence, rule.resamples, seed)
    learned = f"{there.left_out} of them learned by it" if few else f"{there.left_out} left out that it had learned"
    found = (
        f"loss {mean:+.4f} nats against {champion.version} on {len(weights)} of that one's test rows ({learned}), "
        f"{rule.confidence:.0%} upper bound {in_words(upper, f'to be below {limit:g}')}"
    )
    if upper < limit:
        return True, found
    if candidate.approved_by:
        return True, f"{found}; vouched for by {', '.join(candidate.approved_by)}"
    return False, (
        f"{found}; if it is meant to take that one's place all the same, let somebody else vouch for it by `peftcore "
        f"approve {candidate.version} --note TEXT`, or {_free(candidate, champion, gate)}"
    )


def slices(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    from flows.gate.slices import slice_differences

    rule = gate.slices
    if champion is None:
        return True, f"no {gate.stage} yet"
    if rule.max_loss_regression is None:
        return True, "no limit set"
    if _is_same_adapter(candidate, champion):
        return True, f"it is the adapter of {champion.version}"
    allowed = f"at most {rule.max_loss_regression:g}"
    own, theirs, _ = _rows(candidate, champion)
    found = slice_differences(own, theirs, rule, gate.champion.resamples, seed)
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


def _is_same_adapter(candidate: Candidate, champion: Champion) -> bool:
    return candidate.content is not None and candidate.content == champion.content


def _evaluated_again(candidate: Candidate, champion: Champion, gate: Gate) -> Outcome:
    """A new evaluation takes the old one's place; on other test rows, which later versions are then held to, only if
    somebody vouches for them.
    """
    same = f"it is the adapter of {champion.version}, evaluated again"
    if not _has_other_rows(candidate, champion):
        return True, f"{same} on the same test rows"
    if candidate.approved_by:
        return True, f"{same} on other test rows; vouched for by {', '.join(candidate.approved_by)}"
    return False, (
        f"{same} on other test rows, so it cannot be better; let somebody else vouch for these rows by `peftcore "
        f"approve {candidate.version} --note TEXT`, or {_free(candidate, champion, gate)}"
    )


def _looks(candidate: Candidate) -> str:
    """How many tries there were, where there was more than this one."""
    if candidate.looks is None:
        return ""
    rows, trials, since = candidate.looks
    told = []
    if rows > 1:
        told.append(f"version {rows} that was evaluated on these test rows")
    if since > 1:
        told.append(f"candidate {since} since the champion got its stage")
    if trials:
        told.append(f"with {trials} trials of sweeps before it on these data")
    return f"; {', '.join(told)}: each try can pass by chance" if told else ""


def _not_comparable(candidate: Candidate, champion: Champion, gate: Gate) -> str | None:
    losses = [loss or TOKENS for loss in (candidate.metrics.get("loss_function"), champion.loss_function)]
    theirs = {"base_model": champion.base_model, "base_manifest": champion.base_manifest}
    if not have_same_base(candidate.metrics, theirs):
        what = "base model"
    elif losses[0] != losses[1]:
        return (
            f"its test loss is {losses[0]}, and that of {champion.version} is {losses[1]}, so the two cannot be "
            f"compared; {_free(candidate, champion, gate)}"
        )
    elif (
        _has_other_rows(candidate, champion)
        and champion.measure_again is None
        and not _is_same_adapter(candidate, champion)
    ):
        what = "test set"
    else:
        return None
    return (
        f"{champion.version} was measured on another {what}, so the two cannot be compared; run the "
        f"champion's parameters on this {what} first, or {_free(candidate, champion, gate)}"
    )


def _free(candidate: Candidate, champion: Champion, gate: Gate) -> str:
    command = f"gto deprecate {candidate.name} {champion.version} {gate.stage}"
    if gate.allowed_signers is None:
        return f"free the stage with `{command}`"
    # gto signs nothing, and an unsigned tag decides nothing where signers are listed
    return (
        f"free the stage with a signed tag, as `{command}` would make it unsigned: `git tag --sign --message=REASON "
        f"'{candidate.name}#{gate.stage}!#N' {candidate.name}@{champion.version}^{{}}`, N being the next event's number"
    )


def _has_other_rows(candidate: Candidate, champion: Champion) -> bool:
    return candidate.metrics["evaluation_set"] != champion.evaluation_set


def _rows(candidate: Candidate, champion: Champion) -> "tuple[pyarrow.Table, pyarrow.Table, str]":
    """The candidate's and the champion's losses to compare, and how they were found where they were measured again."""
    if not _has_other_rows(candidate, champion):
        return _same_rows(candidate, champion)
    again = champion.again
    if again is None:
        return candidate.rows, champion.rows, ""
    left_out = "none of them" if again.left_out == 0 else str(again.left_out)
    return (
        candidate.rows,
        again.rows,
        (
            f"; {champion.version} was measured again on these {again.rows.num_rows + again.left_out} test rows, and "
            f"{left_out} left out that it had been trained or validated on"
        ),
    )


def _same_rows(candidate: Candidate, champion: Champion) -> "tuple[pyarrow.Table, pyarrow.Table, str]":
    apart = base_difference(candidate.rows, champion.rows)
    if apart is None or apart <= SAME_CONDITIONS:
        return candidate.rows, champion.rows, ""
    why = f"; the base's own losses differ by {apart:.3f} nats between the two evaluations (hardware or software)"
    again, there = champion.again, champion.candidate_there
    if again is None or there is None:
        return candidate.rows, champion.rows, f"{why}, and gate.champion.reevaluate lets neither be measured again"
    own = there.rows if there.all_rows is None else there.all_rows
    # the candidate's measured losses have no slices, which are those of the registered rows
    return _with_slices(own, candidate.rows), again.rows, f"{why}, so both were measured again here"


def base_difference(ours: "pyarrow.Table", theirs: "pyarrow.Table") -> float | None:
    """Mean absolute difference of the base's losses (nats) over the rows of both tables; None if one has none."""
    if not all("base_loss" in table.column_names for table in (ours, theirs)):
        return None
    one, other = (
        dict(zip(*(table[c].to_pylist() for c in ("id", "base_loss")), strict=True)) for table in (ours, theirs)
    )
    shared = one.keys() & other.keys()
    return sum(abs(one[name] - other[name]) for name in shared) / len(shared) if shared else None


def _with_slices(measured: "pyarrow.Table", registered: "pyarrow.Table") -> "pyarrow.Table":
    if "slice" not in registered.column_names:
        return measured
    slices = dict(zip(*(registered[column].to_pylist() for column in ("id", "slice")), strict=True))
    values = [slices[name] for name in measured["id"].to_pylist()]
    return measured.append_column("slice", [values])
