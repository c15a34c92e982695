"""The space of a search, from overrides in Hydra's syntax.

Forms of an override:

    train.learning_rate=tag(log,interval(1e-5,1e-2))     a number between two others, on a logarithmic scale
    train.warmup_share=interval(0,0.2)                   a number between two others
    train.batch_size=int(interval(2,16))                 a whole number between two others, both included
    method.r=range(4,33,4)                               4, 8, ... 32; the end is left out, as in Python
    train.schedule=cosine,linear                         one of several values
    method.use_rslora=true                               a fixed value
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from flows.errors import ParamsError

HELP = (
    "give key=a,b for choices, key=interval(low,high), key=int(interval(low,high)), key=tag(log,interval(low,high)) or "
    "key=range(low,end,step)"
)


@dataclass(frozen=True)
class Space:
    """Searched parameters and fixed ones.

    Attributes:
        searched: {key: its distribution of `optuna.distributions`}.
        fixed: overrides KEY=VALUE that every trial has.
    """

    searched: dict[str, Any]
    fixed: tuple[str, ...]

    def overrides(self, values: dict[str, Any]) -> tuple[str, ...]:
        """Return the overrides of a trial. values: {searched key: its value}."""
        return (*self.fixed, *(f"{key}={_text(values[key])}" for key in self.searched))

    def corners(self) -> list[tuple[str, ...]]:
        """Return overrides with each end of each range and each choice, to check them before anything runs."""
        ends = {key: _ends(distribution) for key, distribution in self.searched.items()}
        first = {key: values[0] for key, values in ends.items()}
        return [self.overrides({**first, key: value}) for key, values in ends.items() for value in values]


def read_space(overrides: Sequence[str]) -> Space:
    """Read a space. Raises ParamsError for an override that cannot be read, and if nothing is searched."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    searched: dict[str, Any] = {}
    fixed: list[str] = []
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        for override in parsed:
            key = override.get_key_element().lstrip("+~")
            if not override.is_sweep_override():
                fixed.append(override.input_line or "")
            elif key in searched:
                raise ParamsError(f"{key} is given twice; {HELP}")
            else:
                searched[key] = _distribution(override)
    except (HydraException, ValueError) as error:
        if isinstance(error, ParamsError):
            raise
        reason = " ".join(str(error).split())
        raise ParamsError(f"{' '.join(overrides)} cannot be read ({reason}); {HELP}") from error
    if not searched:
        raise ParamsError(f"{' '.join(overrides) or 'no parameter'} leaves nothing to search; {HELP}")
    return Space(searched, tuple(fixed))


def _distribution(override: Any) -> Any:
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    distributions: Any = import_module("optuna.distributions")
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        is_log = "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):  # by int(...); Hydra makes floats otherwise
            return distributions.IntDistribution(low, high, log=is_log)
        return distributions.FloatDistribution(float(low or 0), float(high or 0), log=is_log)
    if isinstance(value, RangeSweep | ChoiceSweep):
        values = list(override.sweep_iterator())
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)
        choices = [one if numbers or isinstance(one, bool) else str(one) for one in values]
        return distributions.CategoricalDistribution(choices)
    raise ParamsError(f"{override.input_line} is a sweep that a search does not know; {HELP}")


def _ends(distribution: Any) -> list[Any]:
    choices = getattr(distribution, "choices", None)
    return list(choices) if choices is not None else [distribution.low, distribution.high]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
