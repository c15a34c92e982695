"""The space of a search, in Hydra's syntax."""

import pytest

from flows.errors import ParamsError
from flows.scaling.space import read_space

distributions = pytest.importorskip("optuna.distributions", reason="the extra optuna is not part of the environment")


def test_each_form_has_its_distribution() -> None:
    space = read_space(
        [
            "train.learning_rate=tag(log,interval(1e-5,1e-2))",
            "train.warmup_share=interval(0,0.2)",
            "train.batch_size=int(interval(2,16))",
            "method.r=range(4,33,4)",
            "train.schedule=cosine,linear",
            "method.use_rslora=true,false",
            "train.epochs=2.0",
        ]
    )
    assert space.searched == {
        "train.learning_rate": distributions.FloatDistribution(1e-5, 1e-2, log=True),
        "train.warmup_share": distributions.FloatDistribution(0.0, 0.2),
        "train.batch_size": distributions.IntDistribution(2, 16),
        "method.r": distributions.CategoricalDistribution([4, 8, 12, 16, 20, 24, 28, 32]),
        "train.schedule": distributions.CategoricalDistribution(["cosine", "linear"]),
        "method.use_rslora": distributions.CategoricalDistribution([True, False]),
    }
    assert space.fixed == ("train.epochs=2.0",)


def test_a_trial_has_its_values_and_the_fixed_ones() -> None:
    space = read_space(["method.use_rslora=true,false", "train.epochs=2.0"])
    assert space.overrides({"method.use_rslora": False}) == ("train.epochs=2.0", "method.use_rslora=false")
    assert space.corners() == [
        ("train.epochs=2.0", "method.use_rslora=true"),
        ("train.epochs=2.0", "method.use_rslora=false"),
    ]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "nothing to search"),
        (["train.epochs=2.0"], "nothing to search"),
        (["train.epochs"], "cannot be read"),
        (["train.epochs=interval(2,1)"], "cannot be read"),
        (["train.epochs=tag(log,interval(0,1.0))"], "cannot be read"),
        (["train.epochs=glob(*)"], "does not know"),
        (["train.epochs=1,2", "train.epochs=3,4"], "given twice"),
    ],
)
def test_what_is_no_space_is_refused_with_the_forms(overrides: list[str], problem: str) -> None:
    with pytest.raises(ParamsError, match=f"{problem}.*give key=a,b for choices"):
        read_space(overrides)
