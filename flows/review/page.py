"""The review page: one HTML file with the results of a run, readable without a network.

The template escapes all text that comes from data or models.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows.charts.curves import headline_bars, largest, loss_curves, reliability, reward_curve, slice_dumbbells
from flows.charts.ranks import HEAT_MAP
from flows.gate.promote import Promotion, last_record, read_promotion
from flows.gate.proposal import as_yaml, first_limits
from flows.params import Params
from flows.paths import Paths
from flows.registry.lineage import read_json
from flows.registry.loss_names import loss_in_words
from flows.training.log import TrainingLog
from flows.verdicts import prompt_passes, prompt_rate
from peftcore.files import sha256, write_atomically


def write_review(params: Params, paths: Paths) -> Path:
    """Write `paths.review` from the last run's files, atomically; returns its path.

    Raises:
        StageError: a stage has not run yet; the message names the missing file.
    """
    page = environment().get_template("review.html").render(_content(params, paths))
    write_atomically(paths.review, page)
    return paths.review


def environment() -> Environment:
    """Return the environment of the package's templates: values are escaped, an undefined value is an error."""
    pages = Environment(
        loader=PackageLoader("flows.review"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        count="{:,}".format,
        percent=_percent,
        fixed=_fixed,
        signed="{:+.3f}".format,
        bytes=_bytes,
        loss_in_words=loss_in_words,
        span=_span,
        moment=lambda text: datetime.fromisoformat(text).strftime("%d %B %Y, %H:%M UTC"),
    )
    return pages


def _content(params: Params, paths: Paths) -> dict[str, Any]:
    record = last_record(paths)
    evaluation = read_json(paths.evaluation_metrics)
    training = read_json(paths.training_summary)
    calibration = evaluation.get("calibration")
    slices, ranks = evaluation["slices"], paths.training / HEAT_MAP
    promotion = read_promotion(paths, record["version"])
    proposals = first_limits(params, paths, promotion)
    base = evaluation["base"]
    base_side = "baseline" if "baseline" in evaluation else "base"
    unit = "token" if "perplexity" in base else "word" if "entity_f1" in base else "row"
    return {
        "record": record,
        "promotion": promotion,
        "limits": as_yaml(proposals) if proposals else None,
        "judge": _judge(paths, promotion),
        "evaluation": evaluation,
        "unit": unit,
        "base_side": base_side,
        "scorers": evaluation.get("scorers") or {},
        "calibration": calibration,
        "best_of_n": evaluation.get("best_of_n"),
        "benchmarks": evaluation.get("benchmarks") or {},
        "suites": _suites(paths, evaluation.get("suites") or {}),
        "training": training,
        "slices": sorted(slices.items(), key=lambda item: (-item[1]["rows"], item[0])),
        "slices_in_chart": len(largest(slices)),
        "unmeasured_slices": sorted(name for name, figures in slices.items() if figures["base_loss"] is None),
        "samples": read_json(paths.samples),
        "data": read_json(paths.data_report),
        "merge": read_json(paths.merge_report),
        "architecture": read_json(paths.architecture),
        "params": params,
        "charts": {
            "headline": headline_bars(evaluation["base"], evaluation["adapter"], base_side),
            "loss": loss_curves(
                paths.loss_curve, training["best_step"], f"nats per {unit.replace('token', 'supervised token')}"
            ),
            "reward": reward_curve(TrainingLog(paths.training_log).records()),
            "slices": slice_dumbbells(slices, base_side),
            "reliability": reliability(calibration["base"], calibration["adapter"], base_side) if calibration else None,
            "ranks": Markup(ranks.read_text(encoding="utf-8")) if ranks.exists() else None,
        },
    }


def _judge(paths: Paths, promotion: Promotion | None) -> dict[str, Any] | None:
    """Return the figures of the judge's comparison, and its rows if this clone has them; None without a comparison."""
    checks = promotion.report.checks if promotion is not None and promotion.report else ()
    figures = next((check.figures for check in checks if check.name == "judge"), None)
    if figures is None:
        return None
    is_written = paths.judgement.exists() and sha256(paths.judgement) == figures["verdicts"]
    # StrictUndefined: an endpoint has no callable, and a callable no endpoint
    identity = dict.fromkeys(("model", "endpoint", "callable", "served")) | figures["identity"]
    rows = read_json(paths.judgement)["rows"] if is_written else []
    return {"figures": {**figures, "identity": identity}, "rows": rows}


def _suites(paths: Paths, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each suite, its failing and its passing prompts."""
    results = read_json(paths.evaluation_suites) if figures else {}
    suites = []
    for name, one in figures.items():
        prompts: dict[bool, list[Any]] = {True: [], False: []}
        for prompt in results[name]["prompts"]:
            prompts[prompt_passes(results[name], prompt)].append(prompt | {"rate": prompt_rate(results[name], prompt)})
        settings = {key: results[name][key] for key in ("seeds", "at_least")}
        suites.append(one | settings | {"name": name, "failing": prompts[False], "passing": prompts[True]})
    return suites


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
