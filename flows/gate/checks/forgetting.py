"""Whether the adapter has made the base worse at plain text that has nothing to do with the task."""

from flows.gate.candidate import Candidate, Outcome
from flows.params import Gate


def forgetting(candidate: Candidate, gate: Gate, seed: int) -> Outcome:
    """The paired bootstrap of the adapter's losses minus the base's, a text as a row that weighs its tokens."""
    from flows.gate.bootstrap import in_words, paired_bootstrap

    limit = gate.max_forgetting
    allowed = "no limit set" if limit is None else f"at most {limit:g}"
    if candidate.metrics.get("control") is None:
        why = "evaluate.control.source is null, or the objective is classification"
        why = why if "control" in candidate.metrics else "the version is from before control sets"
        return True, f"not measured: {why}"
    if candidate.control is None or candidate.control.num_rows == 0:
        return False, f"its control.parquet is gone, {allowed}; run `peftcore run` again"
    columns = (candidate.control.column(name).to_numpy() for name in ("tokens", "adapter_loss", "base_loss"))
    weights, adapter, base = (column.astype(float) for column in columns)
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, adapter, base, rule.confidence, rule.resamples, seed)
    return limit is None or upper <= limit, (
        f"loss {mean:+.4f} nats against the base on {len(weights)} texts of the control set, {rule.confidence:.0%} "
        f"upper bound {in_words(upper, allowed)}"
    )
