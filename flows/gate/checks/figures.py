"""Checks of the candidate's own figures against limits. A limit on a figure that the objective lacks is skipped."""

from flows.gate.candidate import Candidate, CheckResult
from flows.params import Gate, Merge, Rule
from flows.params.gate import FIGURES, Direction
from flows.params.train import WITHOUT_TEXT


def test_loss(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check the test loss; without a limit it has to be a number."""
    loss = candidate.metrics["adapter"]["loss"]
    if gate.max_test_loss is None:
        return loss == loss, f"{loss:.3f} nats, no limit set"
    return within(loss, gate.max_test_loss, "lower", "nats")


def gain_in_loss(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check the test loss of the base minus that of the adapter."""
    return at_least(candidate.metrics["gain"]["loss"], gate.min_loss_gain, "nats")


def at_least(value: float | None, limit: float | None, unit: str = "") -> CheckResult:
    """Check a value against a lower limit; None as limit passes any value, None as value passes no limit."""
    return within(value, limit, "higher", unit)


def within(value: float | None, limit: float | None, better: Direction, unit: str = "") -> CheckResult:
    """Check a value against its limit, a lower one if higher values are better. `at_least` says what None means."""
    unit = unit and f" {unit}"
    if limit is None:
        measured = "not measured" if value is None else f"{value:.3f}{unit}"
        return True, f"{measured}, no limit set"
    allowed = f"at {'least' if better == 'higher' else 'most'} {limit:g}"
    if value is None:
        return False, f"not measured, {allowed}{unit}"
    return value >= limit if better == "higher" else value <= limit, f"{value:.3f}{unit}, {allowed}"


def rule_limits(candidate: Candidate, rule: Rule) -> CheckResult:
    """Check a metric of the adapter against a rule's limit, and its gain over the base."""
    base, adapter = (candidate.metrics[side].get(rule.metric) for side in ("base", "adapter"))
    results = [within(adapter, rule.limit, rule.direction)]
    if rule.gain is not None:
        sign = 1 if rule.direction == "higher" else -1
        gain = None if base is None or adapter is None else sign * (adapter - base)
        passed, detail = at_least(gain, rule.gain)
        results.append((passed, f"gain over the base {detail}"))
    return all(passed for passed, _ in results), "; ".join(detail for _, detail in results) + _failures(candidate, rule)


def _failures(candidate: Candidate, rule: Rule) -> str:
    """Return the number of answers that the scorer failed on, in words; "" if there is none."""
    record = (candidate.metrics.get("scorers") or {}).get(rule.metric)
    if not record or not (count := record["failures"]["adapter"]):
        return ""
    return f"; the scorer failed on {count} of {record['answers']}, which got {record['on_error']:g}"


def figure(candidate: Candidate, part: str, name: str, limit: float | None) -> CheckResult:
    """Check `metrics[part][name]` against a lower limit, if the candidate's objective has this figure."""
    objective = candidate.metrics.get("objective", "sft")
    if name not in FIGURES[objective]:
        unused = "" if limit is None else f" (the limit of {limit:g} is for other objectives)"
        return True, f"not checked: {objective} has no such figure{unused}"
    return at_least(candidate.metrics[part].get(name), limit)


def eos_rate(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check the share of answers that end with EOS before the token limit.

    If the reference answers exceed the token limit too, the detail names the limit as the cause.
    """
    passed, detail = figure(candidate, "adapter", "ended", gate.min_eos_rate)
    answers = candidate.metrics.get("answers")
    if passed or not answers or not answers["longer_known_answers"]:
        return passed, detail
    return passed, (
        f"{detail}; {answers['longer_known_answers']:.0%} of the reference answers have more tokens than "
        f"evaluate.max_new_tokens, {answers['max_new_tokens']}, so no right answer to those rows can end: raise it"
    )


def latency(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check the latency of a single request. The slowdown is the adapter's time per token over the base's."""
    limits = {
        "first token": (gate.max_first_token_ms, " ms"),
        "token": (gate.max_token_ms, " ms"),
        "slowdown": (gate.max_slowdown, "-fold"),
    }
    measured = candidate.metrics.get("latency")
    if measured is None:
        if not any(limit for limit, _ in limits.values()):
            return True, "not measured, no limit set"
        if (objective := candidate.metrics.get("objective")) in WITHOUT_TEXT:
            return True, f"not checked: {objective} generates no text"
        return False, "not measured; set evaluate.latency_rows and run the pipeline again"
    base, adapter = measured["base"], measured["adapter"]
    values = (adapter["first_token_ms"], adapter["token_ms"], adapter["token_ms"] / base["token_ms"])
    details, passed = [], True
    for value, (name, (limit, unit)) in zip(values, limits.items(), strict=True):
        details.append(f"{name} {value:.2f}{unit}" + (f", at most {limit:g}" if limit else ""))
        passed = passed and (limit is None or value <= limit)
    return passed, "; ".join(details) + ("" if any(limit for limit, _ in limits.values()) else "; no limit set")


def merge_fidelity(candidate: Candidate, merge: Merge) -> CheckResult:
    """Check the merged model against base and adapter apart: KL divergence and agreement of the top-1 predictions."""
    divergence, agreement = candidate.merge["kl"], candidate.merge["top1_agreement"]
    if (cosine := candidate.merge.get("cosine")) is not None:
        return (
            cosine >= merge.min_cosine and divergence <= merge.max_kl and agreement >= merge.min_top1_agreement,
            f"cosine similarity of embeddings {cosine:.4f}, at least {merge.min_cosine:g}; KL {divergence:.4f} nats, "
            f"at most {merge.max_kl:g}; the nearest passages agree on {agreement:.1%}, at least "
            f"{merge.min_top1_agreement:.0%}",
        )
    return divergence <= merge.max_kl and agreement >= merge.min_top1_agreement, (
        f"KL {divergence:.4f} nats, at most {merge.max_kl:g}; "
        f"top-1 predictions agree on {agreement:.1%}, at least {merge.min_top1_agreement:.0%}"
    )
