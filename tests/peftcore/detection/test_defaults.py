"""Default targets against HF PEFT's tables, on the layers that the names reach in a tiny model."""

import re
from functools import cache
from typing import Any

import pytest
from detection_models import CASES as TINY_MODELS
from detection_models import CAUSAL, MASKED, SEQ2SEQ, build
from peft.utils import constants
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tiny_models import tiny
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from peftcore import LoraConfig, TargetError
from peftcore.detection import Architecture, detect
from peftcore.detection.defaults import PRACTICE
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import complete, find_targets
from peftcore.methods.ln_tuning import LNTuningConfig

_HEAD, _TAIL = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
TABLES: dict[str, dict[str, Any]] = {
    name.removeprefix(_HEAD).removesuffix(_TAIL): table
    for name, table in vars(constants).items()
    if name.startswith(_HEAD) and name.endswith(_TAIL)
}
TABLES["LN_TUNING"] = TABLES.pop("LNTUNING")
FEEDFORWARD = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

UNKNOWN = {"chatglm", "RefinedWebModel", "RefinedWeb", "btlm", "rwkv7"}
"""Families of PEFT's tables that live on the Hub, not in transformers."""

SUFFIX = "PEFT's suffix also reaches a layer that is no part of an MLP"
WHOLE = "OSF's paper adapts every matrix; PEFT's names miss some in this family"
DIFFERENCES = {
    ("roberta", "ADALORA"): f"{SUFFIX}: the head's `dense`",
    ("deberta-v2", "ADALORA"): f"{SUFFIX}: the head's `dense`",
    ("deberta-v2", "VBLORA"): f"{SUFFIX}: the head's `dense`",
    **{(f, "IA3"): f"{SUFFIX}: attention.output.dense" for f in ("bert", "roberta", "deberta", "deberta-v2")},
    ("mt5", "IA3"): "scaling the output of wi_1 or the input of wo is one and the same; wo is what T5 scales",
    ("llama4", "IA3"): "PEFT's names leave out the MLPs of the vision tower, but not its attention",
    **{(family, "OSF"): WHOLE for family in ["llama4", "phi", "gpt2", "bloom", "gpt_neox", "falcon", "gpt_bigcode"]},
    **{(f, "LN_TUNING"): "PEFT names one norm of each block only" for f in ("qwen2", "qwen3")},
    ("llava", "LN_TUNING"): "PEFT also lists layers that are no norms, and leaves out those of the vision tower",
    (
        "blip-2",
        "LN_TUNING",
    ): "the vision tower's norms have other names in transformers 5; the Q-Former's first is input",
    **{("vit", m): "transformers 5 renamed query and value" for m in ("ADAMSS", "FROD")},
    ("dinov2", "PVERA"): "transformers 5 renamed query and value",
}
"""{(family, method): why the layers are not the same}; every method in BLIP-2 has a reason of its own."""
BLIP2 = "PEFT adapts the language model alone; here all three towers"


@cache
def built(family: str) -> tuple[nn.Module, Architecture]:
    model = tiny(family)
    return model, detect(model)


def reached(model: nn.Module, names: str | list[str]) -> set[str]:
    """Paths that PEFT adapts for these target modules."""
    paths = [path for path, _ in model.named_modules()]
    if isinstance(names, str):
        return {path for path in paths if re.fullmatch(names, path)}
    return {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}


FAMILIES = sorted({family for table in TABLES.values() for family in table} - UNKNOWN)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_layers_as_peft(family: str) -> None:
    model, found = built(family)
    for method in (method for method, table in TABLES.items() if family in table):
        ours = reached(model, found.target_regex(found.targets_for(method)))
        theirs = reached(model, TABLES[method][family])
        if (family, method) in DIFFERENCES:
            assert ours != theirs, method
        elif family == "blip-2":
            assert ours > theirs, (method, BLIP2)
        else:
            assert ours == theirs, method


def test_the_unknown_families_are_unknown_to_transformers() -> None:
    named = {family for table in TABLES.values() for family in table}
    assert named - set(CONFIG_MAPPING_NAMES) == UNKNOWN


@pytest.mark.parametrize("family", sorted(set(FEEDFORWARD) - UNKNOWN))
def test_ia3_scales_the_same_inputs_as_peft(family: str) -> None:
    model, found = built(family)
    ours = reached(model, found.target_regex(found.feedforward_modules)) if found.feedforward_modules else set()
    same = ours == reached(model, list(FEEDFORWARD[family]))
    assert same == ((family, "IA3") not in DIFFERENCES)


def test_every_practice_has_a_reason_and_changes_something() -> None:
    for practice in PRACTICE:
        assert practice.reason
        for family in practice.families.split():
            _, found = built(family)
            for method in practice.methods.split() or ["LORA"]:
                names = [n for n, i in found.target_modules.items() if i.role in practice.roles]
                assert found.targets_for(method) == names


def test_a_method_without_a_rule_adapts_what_lora_does() -> None:
    found = built("llama")[1]
    assert found.targets_for("A_METHOD_OF_TOMORROW") == list(found.default_targets) == ["q_proj", "v_proj"]


def test_a_configuration_without_targets_takes_its_methods_own() -> None:
    model = tiny("gpt2", "cpu")
    assert {path.split(".", 3)[3] for path in find_targets(model, LoraConfig())} == {"attn.c_attn"}
    assert complete(ModuleIndex(model), LoraConfig())[0].target_modules == {"c_attn"}


def test_an_identity_in_a_layers_place_is_left_alone() -> None:
    model, found = built("modernbert")  # its first block has no norm before attention
    assert isinstance(model.get_submodule("model.layers.0.attn_norm"), nn.Identity)
    assert found.norms["attn_norm"].count == 1


def test_ia3_writes_down_what_it_scales_at_the_input() -> None:
    from peftcore.methods.ia3 import IA3Config

    model = tiny("llama", "cpu")
    whole, _ = complete(ModuleIndex(model), IA3Config())
    assert (whole.target_modules, whole.feedforward_modules) == ({"k_proj", "v_proj", "down_proj"}, {"down_proj"})
    own, _ = complete(ModuleIndex(model), IA3Config(target_modules=["q_proj", "down_proj"]))
    assert own.feedforward_modules == {"down_proj"}


def test_a_model_without_targets_for_a_method_says_which_method() -> None:
    with pytest.raises(TargetError, match="LN_TUNING"):
        find_targets(nn.Sequential(nn.Linear(4, 4)), LNTuningConfig())


@pytest.mark.parametrize("family", sorted(set(TINY_MODELS) & set(PEFT_TARGETS)))
def test_default_targets_are_those_of_peft(family: str, architectures: dict[str, Architecture]) -> None:
    assert set(architectures[family].default_targets) == set(PEFT_TARGETS[family])


@pytest.mark.parametrize("family", ["bart", "mpt", "gptj", "codegen", "gpt_bigcode", "gpt_neo", "deberta", "electra"])
def test_default_targets_are_those_of_peft_for_whole_size_configurations(family: str) -> None:
    auto_class = {"bart": SEQ2SEQ, "deberta": MASKED, "electra": MASKED}.get(family, CAUSAL)
    assert set(detect(build(family, auto_class)).default_targets) == set(PEFT_TARGETS[family])


def test_a_convolutional_network_defaults_to_its_convolutions() -> None:
    found = detect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    assert found.default_targets == ("0", "2")
    assert found.all_linear == ()
