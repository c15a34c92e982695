"""Figures of the candidate alone against a limit. A limit on what an objective does not have is passed over, and the
check says so.
"""

from flows.gate.candidate import Candidate, Outcome
from flows.params import Gate, Merge

FIGURES = {
    "sft": {"rouge_l", "ended"},
    "dpo": {"rouge_l", "ended", "accuracy"},
    "orpo": {"rouge_l", "ended", "accuracy"},
    "classification": {"accuracy"},
}
"""{objective: the figures beside the loss that its evaluation has}"""


def test_loss(candidate: Candidate, gate: Gate) -> Outcome:
    loss = candidate.metrics["adapter"]["loss"]
    if gate.max_test_loss is None:
        return loss == loss, f"{loss:.3f} nats, no limit set"
    return loss <= gate.max_test_loss, f"{loss:.3f} nats, at most {gate.max_test_loss:g}"


def gain_in_loss(candidate: Candidate, gate: Gate) -> Outcome:
    return at_least(candidate.metrics["gain"]["loss"], gate.min_loss_gain, "nats")


def at_least(value: float | None, limit: float | None, unit: str = "") -> Outcome:
    if limit is None:
        told = "not measured" if value is None else f"{value:.3f}{unit and ' ' + unit}"
        return True, f"{told}, no limit set"
    if value is None:
        return False, f"not measured, at least {limit:g} {unit}".rstrip()
    return value >= limit, f"{value:.3f}{unit and ' ' + unit}, at least {limit:g}"


def figure(candidate: Candidate, part: str, name: str, limit: float | None) -> Outcome:
    objective = candidate.metrics.get("objective", "sft")
    if name not in FIGURES[objective]:
        unused = "" if limit is None else f" (the limit of {limit:g} is for other objectives)"
        return True, f"not checked: {objective} has no such figure{unused}"
    return at_least(candidate.metrics[part].get(name), limit)


def ended(candidate: Candidate, gate: Gate) -> Outcome:
    """The share of answers that end by themselves; where the known ones are cut off as well, that is the cause."""
    passed, told = figure(candidate, "adapter", "ended", gate.min_eos_rate)
    answers = candidate.metrics.get("answers")
    if passed or not answers or not answers["longer_known_answers"]:
        return passed, told
    return passed, (
        f"{told}; {answers['longer_known_answers']:.0%} of the known answers have more than the "
        f"{answers['max_new_tokens']} tokens of evaluate.max_new_tokens, so no right answer to those ends: raise it"
    )


def latency(candidate: Candidate, gate: Gate) -> Outcome:
    """Of one request that has the model to itself; the slowdown is the adapter's time for a token over the base's."""
    limits = {
        "first token": (gate.max_first_token_ms, " ms"),
        "token": (gate.max_token_ms, " ms"),
        "slowdown": (gate.max_slowdown, "-fold"),
    }
    measured = candidate.metrics.get("latency")
    if measured is None:
        if not any(limit for limit, _ in limits.values()):
            return True, "not measured, no limit set"
        if candidate.metrics.get("objective") == "classification":
            return True, "not checked: classification writes nothing"
        return False, "not measured; give evaluate.latency_rows and run the pipeline again"
    base, adapter = measured["base"], measured["adapter"]
    values = (adapter["first_token_ms"], adapter["token_ms"], adapter["token_ms"] / base["token_ms"])
    told, passed = [], True
    for value, (name, (limit, unit)) in zip(values, limits.items(), strict=True):
        told.append(f"{name} {value:.2f}{unit}" + (f", at most {limit:g}" if limit else ""))
        passed = passed and (limit is None or value <= limit)
    return passed, "; ".join(told) + ("" if any(limit for limit, _ in limits.values()) else "; no limit set")


def merge_fidelity(candidate: Candidate, merge: Merge) -> Outcome:
    divergence, agreement = candidate.merge["kl"], candidate.merge["top1_agreement"]
    return divergence <= merge.max_kl and agreement >= merge.min_top1_agreement, (
        f"KL {divergence:.4f} nats, at most {merge.max_kl:g}; "
        f"first choices agree on {agreement:.1%}, at least {merge.min_top1_agreement:.0%}"
    )
