"""Check that the adapter has not made the base worse at plain text unrelated to the task."""

from flows.gate.candidate import Candidate, CheckResult
from flows.gate.sequence import percent
from flows.params import Gate


def forgetting(candidate: Candidate, gate: Gate, seed: int) -> CheckResult:
    """Check the loss that the adapter adds on the control set, by a paired bootstrap over texts."""
    from flows.gate.bootstrap import bound_in_words, paired_bootstrap

    limit = gate.max_forgetting
    allowed = "no limit set" if limit is None else f"at most {limit:g}"
    if candidate.metrics.get("control") is None:
        why = "evaluate.control.source is null, or the model generates no answers to chats"
        why = why if "control" in candidate.metrics else "the version was registered before there were control sets"
        return True, f"not measured: {why}"
    if candidate.control is None or candidate.control.num_rows == 0:
        return False, f"its control.parquet is missing, {allowed}; run `peftcore run` again"
    columns = (candidate.control.column(name).to_numpy() for name in ("tokens", "adapter_loss", "base_loss"))
    weights, adapter, base = (column.astype(float) for column in columns)
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, adapter, base, rule.confidence, rule.resamples, seed)
    return limit is None or upper <= limit, (
        f"loss {mean:+.4f} nats against the base on {len(weights)} texts of the control set, "
        f"{percent(rule.confidence)} upper bound {bound_in_words(upper, allowed)}"
    )
