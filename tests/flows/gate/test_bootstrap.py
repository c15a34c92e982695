"""The paired bootstrap against what is known in closed form."""

from statistics import NormalDist

import numpy
import pyarrow
import pytest
import scipy.stats

from flows.errors import GateError
from flows.gate.bootstrap import expanded, paired_bootstrap, paired_losses, paired_values

N = 400


@pytest.fixture
def losses() -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Tokens, ours, theirs: ours is 0.05 better on average, with a spread of 0.4 from row to row."""
    generator = numpy.random.default_rng(1)
    theirs = generator.normal(2.7, 1.0, N)
    difference = generator.normal(-0.05, 0.4, N)
    return numpy.ones(N), theirs + difference, theirs


def test_the_bound_is_that_of_the_normal_approximation(losses: tuple) -> None:
    tokens, ours, theirs = losses
    mean, upper = paired_bootstrap(tokens, ours, theirs, confidence=0.95, resamples=10_000, seed=0)
    difference = ours - theirs
    assert mean == pytest.approx(difference.mean())
    assert upper == pytest.approx(difference.mean() + 1.645 * difference.std() / N**0.5, abs=0.003)


def test_pairing_takes_out_what_rows_have_in_common(losses: tuple) -> None:
    tokens, _, theirs = losses
    _, upper = paired_bootstrap(tokens, theirs - 0.01, theirs, 0.99, 2000, 0)
    assert upper == pytest.approx(-0.01), "a constant gain is certain, however much the rows differ"


def test_equal_losses_have_no_difference(losses: tuple) -> None:
    tokens, ours, _ = losses
    assert paired_bootstrap(tokens, ours, ours, 0.95, 500, 0) == (0.0, 0.0)


def test_rows_weigh_as_much_as_they_have_tokens() -> None:
    mean, _ = paired_bootstrap(numpy.array([9.0, 1.0]), numpy.array([1.0, 2.0]), numpy.array([2.0, 0.0]), 0.9, 100, 0)
    assert mean == pytest.approx((9 * -1 + 1 * 2) / 10)


@pytest.mark.parametrize("n", [5, 10, 30, 1000])
def test_a_bound_of_few_rows_is_students(n: int) -> None:
    """With the resamples' deviation, which is that of the rows without Bessel's correction, it is t's bound."""
    share = expanded(0.95, numpy.full(n, 3.0))
    deviations = NormalDist().inv_cdf(share) * ((n - 1) / n) ** 0.5
    assert deviations == pytest.approx(scipy.stats.t.ppf(0.95, n - 1), rel=1e-9)
    assert expanded(0.95, numpy.array([3.0] * n + [1e-9] * 50)) == pytest.approx(share), "rows that weigh nothing"


def test_where_a_few_rows_are_much_worse_the_bound_is_the_studentized_one() -> None:
    generator = numpy.random.default_rng(5)
    weights = generator.integers(5, 30, 60).astype(float)
    differences = generator.exponential(0.3, 60) - 0.4
    _, upper = paired_bootstrap(weights, differences, numpy.zeros(60), 0.95, 20_000, 0)

    def mean_and_error(w: numpy.ndarray, d: numpy.ndarray) -> tuple[float, float]:
        mean = sum(w * d) / sum(w)
        return mean, sum((w * (d - mean)) ** 2) ** 0.5 / sum(w)

    mean, error = mean_and_error(weights, differences)
    deviations = []
    for _ in range(20_000):
        drawn = generator.integers(60, size=60)
        other, other_error = mean_and_error(weights[drawn], differences[drawn])
        deviations.append((other - mean) / other_error)
    assert upper == pytest.approx(mean - numpy.quantile(deviations, 0.05) * error, abs=0.003)
    assert upper > mean + 1.8 * error, "percentiles are some 1.7 errors above"


@pytest.mark.slow
@pytest.mark.parametrize("number", [30, 100])
def test_models_that_are_no_better_are_not_judged_better_too_often(number: int) -> None:
    """Binomial: of 2,000 draws at 5 % more than 125 have a probability below 1 %."""
    generator = numpy.random.default_rng(number)
    weights = generator.integers(5, 30, number).astype(float)
    found = 0
    for seed in range(2000):
        differences = generator.standard_t(4, number)
        found += paired_bootstrap(weights, differences, numpy.zeros(number), 0.95, 500, seed)[1] < 0
    assert 60 < found <= 125


@pytest.mark.slow
@pytest.mark.parametrize("binary", [False, True])
def test_a_further_rule_keeps_the_rate_of_false_promotions(binary: bool) -> None:
    """A version has to pass the bounds of its loss and of a score, each at 95 %.

    Three kinds of versions that must not be promoted: no better by the loss; worse by the score, exactly as much as is
    not allowed; both. Binomial: of 400 draws at 5 % more than 31 have a probability below 1 %.
    """
    generator, ones, bound = numpy.random.default_rng(7), numpy.ones(100), 0.1

    def passes(loss: float, score: float, seed: int) -> tuple[bool, bool]:
        """The score of the champion is 0.6 or 0 on average, and that of the candidate lower by `score`."""
        losses = generator.standard_t(4, 100) + loss
        if binary:
            theirs = (generator.random(100) < 0.6).astype(float)
            ours = numpy.where(generator.random(100) < score / 0.6, 0.0, theirs)  # some right answers become wrong
        else:
            theirs, ours = numpy.zeros(100), generator.normal(-score, 0.3, 100)
        _, by_loss = paired_bootstrap(ones, losses, 0 * ones, 0.95, 300, seed)
        _, by_score = paired_bootstrap(ones, -ours, -theirs, 0.95, 300, seed)
        return by_loss < 0, by_score < bound

    for loss, score in ((0.0, 0.0), (-2.0, bound), (0.0, bound)):
        found = [passes(loss, score, seed) for seed in range(400)]
        assert sum(map(all, found)) <= 31
        assert sum(map(all, found)) <= min(sum(one for one, _ in found), sum(other for _, other in found))
    powerful = [passes(-2.0, 0.0, seed) for seed in range(100)]
    assert sum(map(all, powerful)) >= 80, "a better version is promoted"


@pytest.mark.parametrize(
    ("differences", "upper"),
    [
        pytest.param([0.0] * 399 + [-1.0], 0.0025, id="one row is better, which a third of the resamples lack"),
        pytest.param([0.0] * 399 + [1.0], numpy.inf, id="one row is worse, and how much worse they are is unknown"),
        pytest.param([-0.1] * 30, -0.1, id="all alike"),
        pytest.param([0.1 + 0.2 - 0.3] * 30, 0.0, id="all alike but for rounding"),
    ],
)
def test_rows_that_are_alike(differences: list[float], upper: float) -> None:
    ours, theirs = numpy.array(differences), numpy.zeros(len(differences))
    _, found = paired_bootstrap(numpy.ones(len(differences)), ours, theirs, 0.95, 2000, 0)
    assert found == pytest.approx(upper, abs=1e-4)


@pytest.mark.parametrize(("confidence", "fewest"), [(0.95, 5), (0.99, 7), (0.9, 4)])
def test_rows_too_few_to_tell_have_no_bound(confidence: float, fewest: int) -> None:
    for n in range(1, 9):
        mean, upper = paired_bootstrap(numpy.ones(n), numpy.zeros(n), numpy.ones(n), confidence, 500, 0)
        assert (mean, upper) == (-1.0, -1.0 if n >= fewest else numpy.inf)


def test_the_seed_decides(losses: tuple) -> None:
    first, again, other = (paired_bootstrap(*losses, 0.95, 700, seed) for seed in (3, 3, 4))
    assert first == again != other


def table(ids: list[str], losses: list[float]) -> pyarrow.Table:
    return pyarrow.table({"id": ids, "tokens": [5] * len(ids), "adapter_loss": losses})


def test_rows_are_paired_by_id_whatever_their_order() -> None:
    tokens, ours, theirs, _ = paired_losses(
        table(["a", "b", "c"], [1.0, 2.0, 3.0]), table(["c", "x", "a"], [30.0, 0.0, 10.0])
    )
    assert (tokens.tolist(), ours.tolist(), theirs.tolist()) == ([5, 5], [1, 3], [10, 30])


def test_ids_that_repeat_are_refused() -> None:
    with pytest.raises(GateError, match="share an id"):
        paired_losses(table(["a", "a"], [1.0, 2.0]), table(["a"], [1.0]))


def test_rows_weigh_what_the_table_says_and_those_of_no_weight_are_left_out() -> None:
    columns = {"id": ["a", "b", "c"], "tokens": [5, 5, 5], "adapter_loss": [1.0, 2.0, 3.0]}
    plain = pyarrow.table(columns)
    weighted = pyarrow.table(columns | {"weight": [2.0, 0.0, 0.5]})
    assert paired_losses(plain, weighted)[0].tolist() == [5.0, 5.0, 5.0]
    assert [part.tolist() for part in paired_losses(weighted, plain)[:3]] == [[2.0, 0.5], [1.0, 3.0], [1.0, 3.0]]


def test_values_of_a_metric_are_paired_where_both_have_one() -> None:
    ours = table(["a", "b", "c"], [1.0] * 3).append_column("adapter_f1", pyarrow.array([0.25, None, 0.75]))
    theirs = table(["c", "b", "a"], [1.0] * 3).append_column("adapter_f1", pyarrow.array([0.5, 0.5, None]))
    for direction, sign in (("lower", 1), ("higher", -1)):
        paired = paired_values(ours, theirs, "f1", direction)
        assert (paired.ids, paired.weights.tolist()) == (["c"], [1.0])
        assert (paired.ours.tolist(), paired.theirs.tolist()) == ([sign * 0.75], [sign * 0.5])
    assert paired_values(ours, theirs, "other", "lower").ids == []
