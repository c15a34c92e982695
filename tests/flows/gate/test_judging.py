"""The judge's comparison: outcomes, figures, the level of the bound under biased and noisy judges, and the files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pyarrow
import pytest
from pyarrow import parquet
from ruamel.yaml import YAML
from scipy.stats import binom

from flows.errors import StageError
from flows.gate.candidate import AnswerPair
from flows.gate.judging import judge_answers, judge_figures, outcome
from flows.params import Params
from flows.paths import Paths
from peftcore.files import sha256


def rows_of(*orders: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"outcome": outcome(order), "replies": [{"choice": choice} for choice in order]} for order in orders]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (("first", "second"), "won"),
        (("second", "first"), "lost"),
        (("first", "first"), "tied"),
        (("second", "second"), "tied"),
        (("first", "tie"), "tied"),
        (("tie", "tie"), "tied"),
        (("first", "unreadable"), "unreadable"),
        ((), "equal"),
    ],
)
def test_a_prompt_is_won_only_if_both_orders_say_so(choices: tuple[str, ...], expected: str) -> None:
    assert outcome(choices) == expected


def test_the_figures_are_those_of_the_exact_sign_test() -> None:
    won, lost, first = ("first", "second"), ("second", "first"), ("first", "first")
    figures = judge_figures(rows_of(*[won] * 9, lost, first, first, ("tie", "tie"), ()), 0.95)
    assert [figures[name] for name in ("prompts", "won", "lost", "tied", "equal", "unreadable")] == [14, 9, 1, 3, 1, 0]
    assert figures["win_rate"] == 0.9
    assert figures["p_value"] == pytest.approx(11 / 1024)  # (C(10, 9) + C(10, 10)) / 2^10
    assert binom.sf(8, 10, figures["lower_bound"]) == pytest.approx(0.05)  # P(X >= 9) at Clopper and Pearson's bound
    assert figures["first_chosen"] == 14 / 24 and (figures["always_first"], figures["always_second"]) == (2, 0)


def test_unreadable_replies_count_as_lost_and_nothing_decided_has_no_evidence() -> None:
    figures = judge_figures(rows_of(("first", "second"), ("unreadable", "first")), 0.95)
    assert figures["win_rate"] == 0.5
    undecided = judge_figures(rows_of(("first", "first"), ("second", "second")), 0.95)
    assert (undecided["win_rate"], undecided["lower_bound"], undecided["p_value"]) == (None, 0.0, 1.0)
    assert undecided["first_chosen"] == 0.5
    assert judge_figures(rows_of(()), 0.95)["first_chosen"] is None


@pytest.mark.parametrize("decided", [5, 40, 128])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_the_bound_has_its_level_for_every_number_of_decided_prompts(decided: int, margin: float) -> None:
    won, lost, rate = ("first", "second"), ("second", "first"), 0.5 - margin
    passing = [
        count
        for count in range(decided + 1)
        if judge_figures(rows_of(*[won] * count, *[lost] * (decided - count)), 0.95)["lower_bound"] > rate
    ]
    assert sum(binom.pmf(passing, decided, rate)) <= 0.05
    assert passing == list(range(passing[0], decided + 1)), "more wins never refuse"


class Judge:
    """Chooses the first answer with probability `bias`; else the better one, with probability 1 - `noise`."""

    def __init__(self, bias: float, noise: float, seed: int) -> None:
        self.bias, self.noise, self.random = bias, noise, numpy.random.default_rng(seed)

    def orders(self, candidate_is_better: Any) -> list[tuple[str, str]]:
        shape = (len(candidate_is_better), 2)
        choose_candidate = candidate_is_better[:, None] ^ (self.random.random(shape) < self.noise)
        choose_first = numpy.where([[True, False]], choose_candidate, ~choose_candidate)
        choose_first |= self.random.random(shape) < self.bias
        names = numpy.where(choose_first, "first", "second")
        return [(str(one), str(other)) for one, other in names]

    def quality(self, win_rate: float) -> float:
        """The share of prompts with a better candidate at which the win rate of decided prompts is `win_rate`."""
        right, wrong = (
            (self.bias + (1 - self.bias) * one) * (1 - self.bias) * one for one in (1 - self.noise, self.noise)
        )
        return (win_rate * (right + wrong) - wrong) / (right - wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "noise"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.2), (0.6, 0.2)])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_a_biased_and_noisy_judge_promotes_no_more_than_its_level(bias: float, noise: float, margin: float) -> None:
    judge, trials, prompts = Judge(bias, noise, seed=7), 1000, 100
    quality = judge.quality(0.5 - margin)
    promoted, first_alone, chosen = 0, 0, []
    for _ in range(trials):
        orders = judge.orders(judge.random.random(prompts) < quality)
        figures = judge_figures(rows_of(*orders), 0.95)
        promoted += figures["lower_bound"] > 0.5 - margin
        chosen.append(figures["first_chosen"])
        one_order = rows_of(*[("first", "second") if order[0] == "first" else ("second", "first") for order in orders])
        first_alone += judge_figures(one_order, 0.95)["lower_bound"] > 0.5 - margin
    print(f"bias {bias}, noise {noise}, margin {margin}: {promoted} of {trials}; in one order {first_alone}")
    assert promoted / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5
    assert numpy.mean(chosen) == pytest.approx(bias + (1 - bias) / 2, abs=0.01), "the bias is measured"
    if bias >= 0.4:
        assert first_alone / trials > 0.5, "a judge that saw the candidate first only would promote it"


def test_a_better_candidate_passes_a_biased_judge() -> None:
    judge = Judge(0.4, 0.1, seed=3)
    figures = judge_figures(rows_of(*judge.orders(judge.random.random(200) < 0.8)), 0.95)
    assert figures["lower_bound"] > 0.5


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Test rows with prompts, and a judge that prefers the longer answer and counts its calls."""
    paths = Paths(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "judge.py").write_text(
        "def longer(prompt, first, second, reference):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
        "        print(prompt, reference, file=file)\n"
        "    return 'first' if len(first) > len(second) else 'second'\n"
    )
    paths.data.mkdir(parents=True)
    table = {"id": ["r0", "r1", "r2"], "prompt": ["What?", "Why?", "How?"], "labels": [0, 0, 0]}
    parquet.write_table(pyarrow.table(table), paths.split("test"))
    return paths


def params_of(**judge: Any) -> Params:
    return Params.model_validate({"gate": {"judge": {"callable": "data/judge.py:longer"} | judge}})


def candidate_of(paths: Paths) -> Any:
    return SimpleNamespace(version="v0.1.1", metrics={"evaluation_set": sha256(paths.split("test"))})


PAIRS = [AnswerPair("r0", "ref0", "long answer", "short"), AnswerPair("r2", "ref2", "no", "yes!")]


def test_a_second_comparison_asks_nothing_and_gives_the_same(paths: Paths) -> None:
    registry: Any = None  # only registered files need it
    first = judge_answers(params_of(), paths, registry, candidate_of(paths), None, PAIRS)
    assert (first["prompts"], first["won"], first["lost"]) == (2, 1, 1)
    assert first["identity"]["files"] == {"data/judge.py": sha256(paths.root / "data" / "judge.py")}
    calls = (paths.root / "calls").read_text().split("\n")
    assert sorted(calls) == ["", "How? ref2", "How? ref2", "What? ref0", "What? ref0"]
    assert judge_answers(params_of(), paths, registry, candidate_of(paths), None, PAIRS) == first
    assert len((paths.root / "calls").read_text().split("\n")) == 5
    assert sha256(paths.judgement) == first["verdicts"]
    written = json.loads(paths.judgement.read_text())["rows"]
    assert [(row["id"], row["prompt"], row["outcome"]) for row in written] == [
        ("r0", "What?", "won"),
        ("r2", "How?", "lost"),
    ]


def test_rows_limits_the_prompts_to_a_sample_that_the_seed_fixes(paths: Paths) -> None:
    registry: Any = None
    first = judge_answers(params_of(rows=1), paths, registry, candidate_of(paths), None, PAIRS)
    assert first["prompts"] == 1
    assert judge_answers(params_of(rows=1), paths, registry, candidate_of(paths), None, PAIRS) == first


def test_a_judge_that_fails_and_other_test_rows_are_errors(paths: Paths) -> None:
    registry: Any = None
    broken = params_of(callable="data/judge.py:shorter")
    with pytest.raises(StageError, match=r"the comparison by the judge failed: gate\.judge: data/judge\.py has no"):
        judge_answers(broken, paths, registry, candidate_of(paths), None, PAIRS)
    other: Any = SimpleNamespace(version="v0.1.1", metrics={"evaluation_set": "0" * 64})
    with pytest.raises(StageError, match="differs from the test rows"):
        judge_answers(params_of(), paths, registry, other, None, PAIRS)
    assert not paths.judgement.exists()


def test_the_example_of_the_documentation_works(paths: Paths) -> None:
    text = (Path(__file__).parents[3] / "docs" / "how-to" / "judge.md").read_text()
    section = YAML(typ="safe").load(text.split("```yaml\n")[1].split("```")[0])
    assert Params.model_validate(section).gate.judge.model == "judge-7b"
    (paths.root / "data" / "judge.py").write_text(text.split("```python\n")[1].split("```")[0])
    registry: Any = None
    pairs = [AnswerPair("r0", "1234", "123", "1"), AnswerPair("r1", "1", "12345", "2"), AnswerPair("r2", "1", "2", "3")]
    figures = judge_answers(
        params_of(callable="data/judge.py:prefer"), paths, registry, candidate_of(paths), None, pairs
    )
    assert (figures["won"], figures["lost"], figures["tied"]) == (1, 1, 1)


def test_the_power_of_the_documentation_is_right() -> None:
    """A candidate as good as the champion passes a margin of 0.1 in half of the cases with 70 decided prompts."""
    won, lost = ("first", "second"), ("second", "first")
    for decided, least, most in ((70, 0.4, 0.6), (270, 0.93, 0.97)):
        passing = [
            count
            for count in range(decided + 1)
            if judge_figures(rows_of(*[won] * count, *[lost] * (decided - count)), 0.95)["lower_bound"] > 0.4
        ]
        assert least < sum(binom.pmf(passing, decided, 0.5)) < most
