"""Options of a variant: a dictionary whose keys are attributes, too."""

from typing import Any

import pytest

from peftcore import ConfigError
from peftcore.methods.lora.options import Options


class Noise(Options):
    def __init__(self, variance: float = 0.5, seed: int = 0):
        super().__init__(variance=variance, seed=seed)


def test_an_attribute_is_the_value_of_its_key() -> None:
    options = Noise()
    options.seed = 3
    assert (options.seed, options["seed"], options.variance) == (3, 3, 0.5)
    assert options.to_dict() == {"variance": 0.5, "seed": 3} and type(options.to_dict()) is dict


def test_an_unknown_option_is_an_error_that_names_the_options() -> None:
    options: Any = Noise()
    with pytest.raises(AttributeError, match="Noise has no option 'sed'; it has variance, seed"):
        options.sed = 3
    with pytest.raises(AttributeError, match="Noise has no option 'sed'"):
        options.sed  # noqa: B018
    with pytest.raises(ConfigError, match="noise_config has no 'sed'; did you mean 'seed'"):
        Noise.made_from({"sed": 3}, "noise_config")


def test_a_saved_dictionary_gets_the_defaults() -> None:
    assert Noise.made_from({"seed": 3}, "noise_config") == {"variance": 0.5, "seed": 3}
    options = Noise(1.0)
    assert Noise.made_from(options, "noise_config") is options
