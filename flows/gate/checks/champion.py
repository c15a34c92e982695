"""Comparison of candidate and champion, row by row: on the candidate's test rows, the champion's rows, and each slice.

If the champion was evaluated on other test rows, each version is re-evaluated on the other version's rows, without rows
that the version was trained or validated on. The same applies to equal rows that were ranked among other passages.
Adapters of different bases or different losses cannot be compared.

Losses of the same rows can differ between machines and software releases. The base shows how much, because it is the
same in both evaluations: if its own losses differ, both versions are re-evaluated here.
"""

from typing import TYPE_CHECKING

from flows.base.identity import have_same_base
from flows.errors import GateError
from flows.gate.candidate import Candidate, Champion, CheckResult
from flows.gate.rows import row_values
from flows.gate.sequence import percent
from flows.params import Gate, Rule
from flows.registry.loss_names import loss_in_words

if TYPE_CHECKING:
    import pyarrow

    from flows.gate.slices import SliceDifference

TOKENS = "cross entropy of tokens"
"""The test loss of a record without `loss_function`."""
FEWEST = 20
"""Minimum number of the champion's test rows that the candidate was not trained or validated on. With fewer such rows,
all of the champion's test rows are compared.
"""
SAME_CONDITIONS = 0.01
"""Largest mean difference (nats per token, absolute per row) of the base's losses at which two evaluations are compared
directly. The limit is well below the gains that adapters are promoted for."""


def against_the_champion(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> CheckResult:
    """Check that the candidate's test loss is lower than the champion's, by a paired bootstrap over the test rows."""
    from flows.gate.bootstrap import bound_in_words, paired_bootstrap, paired_losses

    if champion is None:
        return True, f"no {gate.stage} yet{_reuse(candidate)}"
    refusal = _not_comparable(candidate, champion, gate)
    if refusal:
        return False, refusal
    if is_same_adapter(candidate, champion):
        return _evaluated_again(candidate, champion, gate)
    try:
        candidate_rows, champion_rows, how = _rows(candidate, champion)
    except GateError as error:
        return False, str(error)
    weights, ours, theirs, _ = paired_losses(candidate_rows, champion_rows)
    if len(weights) == 0:
        return False, (
            f"{champion.version} was evaluated on other test rows{how}; evaluate both on rows that it has not seen, or "
            f"{_free(candidate, champion, gate)}"
        )
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, ours, theirs, rule.confidence, rule.resamples, seed)
    return upper < rule.max_loss_regression, (
        f"loss {mean:+.4f} nats against {champion.version} on {len(weights)} rows, {percent(rule.confidence)} upper "
        f"bound {bound_in_words(upper, f'to be below {rule.max_loss_regression:g}')}{how}{_reuse(candidate)}"
    )


def on_the_champions_rows(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> CheckResult:
    """Check that the candidate is not worse, beyond a margin, on the test rows that the champion was registered with.

    The author of the data chooses the test rows, so a better loss on the candidate's own rows may be the loss of an
    easier task. Beyond the margin, a person other than the author has to approve the version.
    """
    from flows.gate.bootstrap import bound_in_words, paired_bootstrap, paired_losses

    if champion is None:
        return True, f"no {gate.stage} yet"
    if not _has_other_rows(candidate, champion):
        return True, "both versions have the same test rows"
    limit = gate.champion.max_loss_regression_on_its_rows
    if limit is None:
        return True, "no limit set"
    measured = champion.candidate_on_own_rows
    if measured is None:
        return False, f"the candidate was not measured on the test rows of {champion.version}"
    few = measured.rows.num_rows < FEWEST and measured.all_rows is not None
    table = measured.all_rows if few and measured.all_rows is not None else measured.rows
    weights, theirs, ours, _ = paired_losses(champion.rows, table)
    if len(weights) == 0:
        return False, f"no row of {champion.version} was measured; {_free(candidate, champion, gate)}"
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, ours, theirs, rule.confidence, rule.resamples, seed)
    count = measured.left_out
    learned = f"the candidate has learned {count} of them" if few else f"without {count} that the candidate has learned"
    detail = (
        f"loss {mean:+.4f} nats against {champion.version} on {len(weights)} test rows of {champion.version} "
        f"({learned}), {percent(rule.confidence)} upper bound {bound_in_words(upper, f'to be below {limit:g}')}"
    )
    if upper < limit:
        return True, detail
    if candidate.approved_by:
        return True, f"{detail}; approved by {', '.join(candidate.approved_by)}"
    return False, (
        f"{detail}; if it shall replace {champion.version} nevertheless, another person approves it by `peftcore "
        f"approve {candidate.version} --note TEXT`, or {_free(candidate, champion, gate)}"
    )


def rule_bound(candidate: Candidate, champion: Champion | None, gate: Gate, rule: Rule, seed: int) -> CheckResult:
    """Check that the candidate is by a rule's metric not worse than the champion by the rule's bound or more."""
    from flows.gate.bootstrap import bound_in_words, paired_bootstrap, paired_values

    if champion is None or rule.bound is None:
        return True, f"no {gate.stage} yet"
    if is_same_adapter(candidate, champion):
        return True, f"it is the adapter of {champion.version}"
    try:
        candidate_rows, champion_rows, how = metric_rows(candidate, champion, rule.metric)
    except GateError as error:
        return False, str(error)
    weights, ours, theirs, _ = paired_values(candidate_rows, champion_rows, rule.metric, rule.direction)
    if len(weights) == 0:
        return False, f"no row has {rule.metric} of both versions{how}"
    settings = gate.champion
    regression, upper = paired_bootstrap(weights, ours, theirs, settings.confidence, settings.resamples, seed)
    difference = regression if rule.direction == "lower" else -regression
    bound = bound_in_words(upper, f"to be below {rule.bound:g}")
    return upper < rule.bound, (
        f"{rule.metric} {difference:+.4f} against {champion.version} on {len(weights)} rows, "
        f"{percent(settings.confidence)} upper bound of the regression {bound}{how}"
    )


def slices(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> CheckResult:
    """Check that the candidate is in no slice of the test rows worse than the champion, beyond a margin.

    The margin of the loss is `gate.slices.max_loss_regression`, and that of another metric its rule's `slice_bound`.
    """
    from flows.gate.slices import Compared, metric_differences

    rule = gate.slices
    rules = [one for one in gate.rules if one.slice_bound is not None]
    if champion is None:
        return True, f"no {gate.stage} yet"
    if rule.max_loss_regression is None and not rules:
        return True, "no limit set"
    if is_same_adapter(candidate, champion):
        return True, f"it is the adapter of {champion.version}"
    compared, limits = [], []
    if rule.max_loss_regression is not None:
        compared.append(Compared("loss", "lower", rule.max_loss_regression, *_rows(candidate, champion)[:2]))
        limits.append(f"at most {rule.max_loss_regression:g}")
    try:
        for one in rules:
            tables = metric_rows(candidate, champion, one.metric)[:2]
            compared.append(Compared(one.metric, one.direction, one.slice_bound or 0.0, *tables))
            limits.append(f"{one.metric} at most {one.slice_bound:g}")
    except GateError as error:
        return False, str(error)
    allowed = ", ".join(limits)
    differences = metric_differences(compared, rule, gate.champion.resamples, seed)
    worse = [one for one in differences if one.is_worse]
    if worse:
        named = "; ".join(f"{_in_words(one)} on {one.rows} rows (p {one.p:.4f})" for one in worse[:3])
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        return False, f"worse than {champion.version} in {named}{more}, {allowed}"
    if not differences:
        return False, f"no row has {' and '.join(one.metric for one in compared)} of both versions"
    largest = max(differences, key=lambda one: -one.p if rules else one.mean)
    return True, (
        f"none of {len(differences)} worse than allowed; the largest difference is {_in_words(largest)} "
        f"on {largest.rows} rows, {allowed}"
    )


def _in_words(one: "SliceDifference") -> str:
    return f"{one.name} {one.mean:+.3f} {'nats' if one.metric == 'loss' else f'in {one.metric}'}"


def metric_rows(candidate: Candidate, champion: Champion, metric: str) -> "tuple[pyarrow.Table, pyarrow.Table, str]":
    """Return the tables of candidate and champion with comparable values of a metric, and a note.

    Raises:
        GateError: the champion has no such values, and may not be re-evaluated.
    """
    ours, theirs, how = _rows(candidate, champion)
    why = _incomparable(candidate, champion, metric) if theirs is champion.rows else None
    if why is None:
        return ours, theirs, how
    measured = champion.on_candidate_rows
    if measured is None:
        raise GateError(
            f"{champion.version} {why}, and gate.champion.reevaluate is false; set it to true, so that the champion is "
            "evaluated again"
        )
    return ours, measured.rows, f"; {champion.version} {why}, so it was re-evaluated"


def _incomparable(candidate: Candidate, champion: Champion, metric: str) -> str | None:
    """Return why the champion's registered values of a metric do not do; None if they do."""
    ours, theirs = ((one.get(metric) or {}) for one in (candidate.metrics.get("scorers") or {}, champion.scorers))
    if any(ours.get(key) != theirs.get(key) for key in ("scorer", "options", "on_error", "files")):
        return f"was evaluated {'with another' if theirs else 'without the'} scorer {metric}"
    tokens = (candidate.metrics.get("answers") or {}).get("max_new_tokens")
    has_answers = bool(ours) or metric in ("rouge_l", "ended")
    if has_answers and None not in (tokens, champion.max_new_tokens) and tokens != champion.max_new_tokens:
        return f"wrote answers of at most {champion.max_new_tokens} tokens, and the candidate {tokens}"
    measured = [
        {name for name, value in zip(rows.column("id").to_pylist(), values, strict=True) if value is not None}
        for rows in (candidate.rows, champion.rows)
        if (values := row_values(rows, metric)) is not None
    ]
    if len(measured) < 2 or (has_answers and not measured[0] <= measured[1]):
        return f"lacks {metric} of some rows"
    return None


def is_same_adapter(candidate: Candidate, champion: Champion) -> bool:
    """Return True if both versions have the same weights."""
    return candidate.content is not None and candidate.content == champion.content


def _evaluated_again(candidate: Candidate, champion: Champion, gate: Gate) -> CheckResult:
    """Check a version whose adapter is the champion's, with a new evaluation.

    Later versions are compared on the test rows of this evaluation. So the check passes for the champion's test rows,
    and other test rows need an approval.
    """
    same = f"it is the adapter of {champion.version}, evaluated again"
    if not _has_other_file(candidate, champion):
        return True, f"{same} on the same test rows"
    if candidate.approved_by:
        return True, f"{same} on other test rows; approved by {', '.join(candidate.approved_by)}"
    return False, (
        f"{same} on other test rows, so it cannot be better; another person approves these rows by `peftcore "
        f"approve {candidate.version} --note TEXT`, or {_free(candidate, champion, gate)}"
    )


def _reuse(candidate: Candidate) -> str:
    """Return the counts of earlier comparisons in words; nothing if this is the first."""
    if candidate.reuse is None:
        return ""
    rows, trials, since = candidate.reuse
    words = []
    if rows > 1:
        words.append(f"version {rows} that was evaluated on these test rows")
    if since > 1:
        words.append(f"candidate {since} since the champion got its stage")
    if trials:
        words.append(f"after {trials} trials of sweeps on these data")
    return f"; {', '.join(words)}: each comparison can pass by chance" if words else ""


def _not_comparable(candidate: Candidate, champion: Champion, gate: Gate) -> str | None:
    losses = [loss or TOKENS for loss in (candidate.metrics.get("loss_function"), champion.loss_function)]
    theirs = {"base_model": champion.base_model, "base_manifest": champion.base_manifest}
    if not have_same_base(candidate.metrics, theirs):
        what = "base model"
    elif losses[0] != losses[1]:
        return (
            f"its test loss is {loss_in_words(losses[0])}, and that of {champion.version} is "
            f"{loss_in_words(losses[1])}, so the two cannot be "
            f"compared; {_free(candidate, champion, gate)}"
        )
    elif (
        _has_other_rows(candidate, champion)
        and champion.reevaluate_champion is None
        and not is_same_adapter(candidate, champion)
    ):
        what = "test set"
    else:
        return None
    return (
        f"{champion.version} was evaluated on another {what}, so the two cannot be compared; run the "
        f"champion's parameters on this {what} first, or {_free(candidate, champion, gate)}"
    )


def _free(candidate: Candidate, champion: Champion, gate: Gate) -> str:
    command = f"gto deprecate {candidate.name} {champion.version} {gate.stage}"
    if gate.allowed_signers is None:
        return f"free the stage with `{command}`"
    # gto makes unsigned tags, which do not count if there is a list of signers
    return (
        f"free the stage with a signed tag (`{command}` makes an unsigned one): `git tag --sign --message=REASON "
        f"'{candidate.name}#{gate.stage}!#N' {candidate.name}@{champion.version}^{{}}`, N being the next event's number"
    )


def _has_other_rows(candidate: Candidate, champion: Champion) -> bool:
    return _has_other_file(candidate, champion) or _has_other_passages(candidate, champion)


def _has_other_file(candidate: Candidate, champion: Champion) -> bool:
    return candidate.metrics["evaluation_set"] != champion.evaluation_set


def _has_other_passages(candidate: Candidate, champion: Champion) -> bool:
    """Return True if rows of the same file were ranked among other passages, so that their values are not comparable.

    An embedding's passages are those of all evaluated rows. The passages of a reranker's row follow from
    `train.reranker.negatives` if the row has none of its own; their number shows in the row's tokens.
    """
    objective = candidate.metrics.get("objective")
    if objective not in ("embedding", "reranker"):
        return False
    ours, theirs = (
        dict(zip(*(rows[column].to_pylist() for column in ("id", "tokens")), strict=True))
        for rows in (candidate.rows, champion.rows)
    )
    if objective == "embedding":
        return ours.keys() != theirs.keys()
    return any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())


def _rows(candidate: Candidate, champion: Champion) -> "tuple[pyarrow.Table, pyarrow.Table, str]":
    """Return the losses of candidate and champion to compare, and a note if they were re-evaluated."""
    if not _has_other_rows(candidate, champion):
        return _same_rows(candidate, champion)
    measured = champion.on_candidate_rows
    if measured is None:
        return candidate.rows, champion.rows, ""
    count = measured.rows.num_rows + measured.left_out
    note = f"; {champion.version} was re-evaluated on these {count} test rows"
    if measured.left_out:
        note += f", without {measured.left_out} that it had been trained or validated on"
    return candidate.rows, measured.rows, note


def _same_rows(candidate: Candidate, champion: Champion) -> "tuple[pyarrow.Table, pyarrow.Table, str]":
    apart = base_difference(candidate.rows, champion.rows)
    if apart is None or apart <= SAME_CONDITIONS:
        return candidate.rows, champion.rows, ""
    why = f"; the base's own losses differ by {apart:.3f} nats between the two evaluations (hardware or software)"
    theirs, ours = champion.on_candidate_rows, champion.candidate_on_own_rows
    if theirs is None or ours is None:
        return candidate.rows, champion.rows, f"{why}, and gate.champion.reevaluate is false"
    table = ours.rows if ours.all_rows is None else ours.all_rows
    # re-evaluated losses come without slices; the registered rows have them
    return _with_slices(table, candidate.rows), theirs.rows, f"{why}, so both were re-evaluated here"


def base_difference(ours: "pyarrow.Table", theirs: "pyarrow.Table") -> float | None:
    """Return the mean absolute difference of the base's losses (nats) over shared rows; None if a table lacks them."""
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
