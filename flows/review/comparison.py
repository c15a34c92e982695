"""Comparison of several runs: their ranking, their figures, and the differences of their configurations."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flows.review.run import Point, Run, Sample, number


@dataclass(frozen=True)
class Headline:
    """A number that is compared between runs.

    Attributes:
        label: the number's name on the page.
        names: keys of a run's summary; the first key with a number gives the value.
        form: format of the value, such as "{:.3f}".
        lower_is_better: None if neither direction is better.
    """

    label: str
    names: tuple[str, ...]
    form: str
    lower_is_better: bool | None = None

    def of(self, run: Run) -> float | None:
        """Return the run's figure; None if it has none."""
        values = (number(run.summary.get(name)) for name in self.names)
        return next((value for value in values if value is not None), None)


TEST_LOSS = Headline("test loss", ("adapter.loss", "test_loss", "test/loss"), "{:.3f}", True)
HEADLINES = (
    TEST_LOSS,
    Headline(
        "validation loss",
        ("training.best_validation_loss", "best_validation_loss", "validation_loss", "eval/loss", "eval_loss"),
        "{:.3f}",
        True,
    ),
    Headline("perplexity", ("adapter.perplexity",), "{:.2f}", True),
    Headline("ROUGE-L", ("adapter.rouge_l",), "{:.3f}", False),
    Headline("EOS rate", ("adapter.ended",), "{:.1%}", False),
    Headline("accuracy", ("adapter.accuracy",), "{:.1%}", False),
    Headline("macro-F1", ("adapter.macro_f1",), "{:.3f}", False),
    Headline("entity F1", ("adapter.entity_f1",), "{:.3f}", False),
    Headline("recall@1", ("adapter.recall_at_1",), "{:.1%}", False),
    Headline("MRR@10", ("adapter.mrr_at_10",), "{:.3f}", False),
    Headline("nDCG@10", ("adapter.ndcg_at_10",), "{:.3f}", False),
    Headline("gain on base", ("gain.loss",), "{:+.3f}", False),
    Headline("trained parameters", ("training.trainable_parameters", "trainable_parameters"), "{:,.0f}"),
    Headline("training seconds", ("training.seconds", "seconds"), "{:,.0f}"),
)
SERIES = {
    "training": ("loss", "train/loss", "train_loss"),
    "validation": ("validation_loss", "eval/loss", "eval_loss"),
}
"""{curve: possible names of its series}"""


@dataclass(frozen=True)
class Figure:
    """The values of one headline, in the order of the runs."""

    headline: Headline
    values: tuple[float | None, ...]

    @property
    def best(self) -> frozenset[int]:
        """Indices of the best runs; empty if all are equal or no direction is better."""
        values_by_run = {index: value for index, value in enumerate(self.values) if value is not None}
        if self.headline.lower_is_better is None or len(set(values_by_run.values())) < 2:
            return frozenset()
        choose: Callable[..., float] = min if self.headline.lower_is_better else max
        best = choose(values_by_run.values())
        return frozenset(index for index, value in values_by_run.items() if value == best)

    def shown(self, place: int) -> str:
        """Return the value of run number `place` (from 0) as text."""
        value = self.values[place]
        return "–" if value is None else self.headline.form.format(value)


@dataclass(frozen=True)
class Comparison:
    """Compared runs.

    Attributes:
        runs: the runs, best first.
        judged_by: the headline of the ranking; None if no run has one.
        figures: the headlines that at least one run has.
        differing: {key of the configuration: its value in each run}, for keys with different values.
        shared: {key of the configuration: value}, for the other keys.
    """

    runs: tuple[Run, ...]
    judged_by: Headline | None
    figures: tuple[Figure, ...]
    differing: dict[str, tuple[Any, ...]]
    shared: dict[str, Any]

    def curve(self, kind: str) -> list[list[Point]]:
        """Return each run's points of the curve "training" or "validation"; empty for a run without that series."""
        return [next((run.history[name] for name in SERIES[kind] if run.history.get(name)), []) for run in self.runs]

    def prompts(self) -> list[tuple[Sample, tuple[str | None, ...]]]:
        """Return (a sample with the prompt, the adapter's answer of each run or None) for each prompt."""
        answers = [{sample.get("prompt", ""): sample for sample in run.samples} for run in self.runs]
        prompts = dict.fromkeys(prompt for of_run in answers for prompt in of_run)
        rows = []
        for prompt in prompts:
            of_runs = [of_run.get(prompt) for of_run in answers]
            first = next(sample for sample in of_runs if sample is not None)
            rows.append((first, tuple(None if one is None else one.get("adapter") for one in of_runs)))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as values for JSON: runs with headlines, best first, and the keys that differ."""
        runs = []
        for place, run in enumerate(self.runs):
            headlines = {figure.headline.label: figure.values[place] for figure in self.figures}
            runs.append(run.as_dict() | {"headlines": headlines})
        judged_by = None if self.judged_by is None else self.judged_by.label
        return {"judged_by": judged_by, "differing": list(self.differing), "runs": runs}


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs in the order of their test loss, or validation loss if no run has one; runs without it come last."""
    judged_by = next((one for one in HEADLINES[:2] if any(one.of(run) is not None for run in runs)), None)
    ordered = tuple(sorted(runs, key=lambda run: _rank(judged_by, run)))
    named = (re.fullmatch(r"scorers\.(\w+)\.answers", key) for run in ordered for key in run.summary)
    scorers = dict.fromkeys(match[1] for match in named if match)
    headlines = (*HEADLINES, *(Headline(name, (f"adapter.{name}",), "{:.3f}") for name in scorers))
    figures = [Figure(headline, tuple(headline.of(run) for run in ordered)) for headline in headlines]
    keys = list(dict.fromkeys(key for run in ordered for key in run.config))
    values = {key: tuple(run.config.get(key) for run in ordered) for key in keys}
    differing = {key: each for key, each in values.items() if any(_unlike(value, each[0]) for value in each)}
    return Comparison(
        ordered,
        judged_by,
        tuple(figure for figure in figures if any(value is not None for value in figure.values)),
        differing,
        {key: each[0] for key, each in values.items() if key not in differing},
    )


def _rank(headline: Headline | None, run: Run) -> tuple[bool, float, str]:
    value = None if headline is None else headline.of(run)
    return value is None, value or 0.0, run.name


def _unlike(one: Any, other: Any) -> bool:
    """Return True if two values differ. 1 equals 1.0, because W&B does not distinguish them; 1 differs from true."""
    return one != other or isinstance(one, bool) != isinstance(other, bool)
