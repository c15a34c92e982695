"""Options as objects: what HF PEFT's objects hold, in the dictionaries that `LoraConfig` takes."""

import inspect

import peft
import peftcore.tuners.lora
import pytest
from peftcore.tuners.lora import CordaConfig

from peftcore import LoraConfig
from peftcore.hf_peft import options


@pytest.mark.parametrize("name", ["CordaConfig", "EvaConfig", "LoraGAConfig", "LoftQConfig", "LoraRuntimeConfig"])
def test_options_and_defaults_are_pefts(name: str) -> None:
    ours, theirs = getattr(peftcore.tuners.lora, name), getattr(peft.tuners.lora.config, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert ours().to_dict() == vars(theirs())


def test_the_objects_go_into_a_lora() -> None:
    eva = LoraConfig(init_lora_weights="eva", eva_config=peftcore.EvaConfig(rho=1.5))
    assert eva.eva_config is not None and eva.eva_config["rho"] == 1.5
    loftq = LoraConfig(init_lora_weights="loftq", loftq_config=peftcore.LoftQConfig(loftq_bits=8))
    assert loftq.to_dict()["loftq_config"] == {"loftq_bits": 8, "loftq_iter": 1}
    LoraConfig(init_lora_weights="lora_ga", lora_ga_config=peftcore.LoraGAConfig(scale="unit"))
    LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"tau": 1.5}, {"tau": -0.1}])
def test_ranges_are_checked_at_once_as_in_peft(options: dict[str, float]) -> None:
    for library in (peftcore, peft):
        with pytest.raises(ValueError, match=next(iter(options))):
            library.EvaConfig(**options)


def test_options_are_attributes() -> None:
    eva = peftcore.EvaConfig()
    eva.tau = 0.5
    assert eva["tau"] == eva.tau == 0.5
    with pytest.raises(AttributeError, match="no option 'tua'"):
        eva.tua = 0.5
    with pytest.raises(AttributeError, match="no option 'tua'"):
        _ = eva.tua


@pytest.mark.parametrize(
    "name", ["PromptTuningInit", "MultitaskPromptTuningInit", "PromptEncoderReparameterizationType"]
)
def test_enumerations_have_pefts_members(name: str) -> None:
    assert {m.name: m.value for m in getattr(options, name)} == {m.name: m.value for m in getattr(peft, name)}
