"""Configurations on disk: what is damaged, unknown or foreign."""

import copy
import inspect
import json
import pickle
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

import peftcore
from peftcore import CheckpointError, ConfigError, LoraConfig, PeftConfig, PeftType, PromptTuningConfig, hf_peft
from peftcore.config import TunerConfig


def test_unknown_method_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'LORA'"):
        PeftConfig.from_dict({"peft_type": "LORRA"})
    with pytest.raises(ConfigError, match="without peft_type"):
        PeftConfig.from_dict({"r": 8})


@pytest.mark.parametrize("name", ["LoraConfig", "AdaLoraConfig"])
def test_fields_that_hf_peft_writes_are_arguments(name: str, tmp_path: Path) -> None:
    steps = {"total_step": 10} if name == "AdaLoraConfig" else {}
    theirs = getattr(peft, name)(target_modules=["q_proj"], **steps)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = getattr(peftcore, name)(**written)
    assert set(written) - {f.name for f in fields(ours)}, "HF PEFT writes keys that have no field here"
    assert ours.target_modules == {"q_proj"}


def test_an_unsupported_argument_of_hf_peft_is_an_error() -> None:
    with pytest.raises(TypeError, match="unknown option 'megatron_config'"):
        LoraConfig(megatron_config={"a": 1})  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown option 'use_dora'"):
        peftcore.AdaLoraConfig(total_step=10, use_dora=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "name, options, beginning",
    [
        ("VeraConfig", {"save_projection": False}, "Specified to not save vera_A and vera_B"),
        ("PveraConfig", {"save_projection": False}, "Specified to not save pvera_A and pvera_B"),
        ("RandLoraConfig", {"save_projection": False}, "Specified to not save basis_A and basis_B"),
        ("TinyLoraConfig", {"save_projection": False}, "Specified to not save projection tensors P"),
        ("LoraConfig", {"init_lora_weights": "eva"}, "`init_lora_weights` is 'eva' but `eva_config` is not specified"),
        ("LoraConfig", {"init_lora_weights": "corda"}, "`init_lora_weights` is 'corda' but `corda_config` is not"),
    ],
)
def test_a_warning_of_hf_peft_begins_with_the_same_words(name: str, options: dict[str, Any], beginning: str) -> None:
    for library in (peft, peftcore):
        with pytest.warns(UserWarning, match=f"^{beginning}"):
            getattr(library, name)(**options)


@pytest.mark.parametrize("name, options", [("LoraConfig", {}), ("AdaLoraConfig", {"total_step": 10})])
def test_options_of_hf_peft_without_effect_can_be_read_and_are_saved(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    written = []
    for library in (peft, peftcore):
        config = getattr(library, name)(**options)
        assert config.megatron_core == "megatron.core" and not getattr(config, "use_dora", False)
        config.save_pretrained(tmp_path)
        written.append(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert written[0] == written[1]
    with pytest.raises(AttributeError, match="has no option 'no_such'"):
        _ = config.no_such
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
@pytest.mark.parametrize("start", ["eva", "corda"])
def test_the_defaults_of_a_start_from_data_are_saved(start: str) -> None:
    ours, theirs = (library.LoraConfig(init_lora_weights=start).to_dict() for library in (peftcore, peft))
    assert ours[f"{start}_config"] == theirs[f"{start}_config"]


def test_the_signature_of_a_class_names_its_options() -> None:
    """Libraries look there whether an option exists, as in `"loftq_config" in str(inspect.signature(LoraConfig))`."""
    for config_class in hf_peft.PEFT_TYPE_TO_CONFIG_MAPPING.values():
        options = inspect.signature(config_class).parameters
        assert list(options) == [option.name for option in fields(config_class) if option.init]
    assert "loftq_config" in str(inspect.signature(LoraConfig))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 8')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)


def test_disk_form_is_sorted_and_names_the_method(tmp_path: Path) -> None:
    LoraConfig(target_modules=["v", "q"]).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert values["peft_type"] == "LORA" and values["target_modules"] == ["q", "v"]
    assert list(values) == sorted(values)


@pytest.mark.parametrize("name", sorted({kind.__name__ for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values()}))
def test_hf_peft_knows_every_key_of_a_default_configuration(name: str, tmp_path: Path) -> None:
    config = getattr(peftcore, name).__new__(getattr(peftcore, name))
    for field in fields(config):  # needed options have no value yet
        default = field.default if field.default_factory is MISSING else field.default_factory()
        setattr(config, field.name, default)
    config.peft_type = getattr(peftcore, name).peft_type
    written = json.loads(config.to_json())
    known = {field.name for field in fields(getattr(peft, name))} | {"peft_type"}
    assert set(written) <= known


def test_types_that_cannot_be_looked_at_are_not_asked() -> None:
    """A package that postpones its annotations has strings for types."""

    @dataclass
    class AnyConfig(TunerConfig):
        whatever: Any = None
        postponed: "int" = 3
        strange_pattern: "dict[str, int] | None" = None

    made = AnyConfig(whatever=object(), postponed="3", strange_pattern={"a": 2})  # pyright: ignore
    assert made.strange_pattern == {"a": 2}
    with pytest.raises(ConfigError, match="not a regular expression"):
        AnyConfig(strange_pattern={"(": 2})


def test_the_method_is_a_member_of_pefts_enumeration() -> None:
    config = LoraConfig()
    assert config.peft_type is PeftType.LORA
    assert config.peft_type.value == peft.LoraConfig().peft_type.value
    assert config.to_dict()["peft_type"] == "LORA"


def test_the_method_may_be_given_and_another_one_warns() -> None:
    assert LoraConfig(peft_type="LORA") == LoraConfig()
    with pytest.warns(UserWarning, match="'IA3' has no effect, because the class has the method 'LORA'"):
        assert LoraConfig(peft_type="IA3").peft_type == "LORA"


def test_the_version_of_the_file_format_is_saved_and_read(tmp_path: Path) -> None:
    config = LoraConfig()
    assert config.peft_version == peft.LoraConfig().peft_version == hf_peft.__version__
    LoraConfig(peft_version="0.9").save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_version == "0.9"


def test_a_development_version_of_the_format_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.config.__version__", "0.99.0.dev3")
    monkeypatch.setattr(
        "importlib.metadata.distribution", lambda _name: Installed('{"vcs_info": {"commit_id": "ab1"}}')
    )
    assert LoraConfig().peft_version == "0.99.0.dev3@ab1"
    for text in (None, '{"url": "file:///here"}'):
        monkeypatch.setattr("importlib.metadata.distribution", lambda _name, text=text: Installed(text))
        assert LoraConfig().peft_version == "0.99.0.dev3@UNKNOWN"
    monkeypatch.setattr("importlib.metadata.distribution", lambda _name: Installed("no JSON"))
    with pytest.warns(UserWarning, match="peft_version names no commit"):
        assert LoraConfig().peft_version == "0.99.0.dev3@UNKNOWN"
    assert LoraConfig(peft_version="0.9").peft_version == "0.9"


class Installed:
    """A distribution with this text of `direct_url.json`."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    def read_text(self, name: str) -> str | None:
        return self.text if name == "direct_url.json" else None


def test_the_fields_of_a_file_without_the_options_of_one_process(tmp_path: Path) -> None:
    config = LoraConfig(r=3)
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    assert PeftConfig.from_json_file(file) == config.to_dict()
    file.write_text(json.dumps({**config.to_dict(), "runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="runtime_config is not read"):
        assert PeftConfig.from_json_file(file) == config.to_dict()


def test_the_fields_of_a_file_hold_the_unset_ones_that_are_not_written(tmp_path: Path) -> None:
    config = peftcore.VeraConfig()
    config.save_pretrained(tmp_path)
    assert "exclude_modules" not in (tmp_path / "adapter_config.json").read_text()
    assert peftcore.VeraConfig.from_json_file(tmp_path / "adapter_config.json") == config.to_dict()


def test_from_peft_type_takes_the_class_of_the_method() -> None:
    assert PeftConfig.from_peft_type(peft_type=PeftType.LORA, r=3) == LoraConfig(r=3)
    assert LoraConfig.from_peft_type(r=3) == LoraConfig(r=3)


def test_a_file_of_something_else_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match="has no peft_type, and 'hidden_size' is no field of LoraConfig") as error:
        LoraConfig.from_pretrained(tmp_path)
    assert isinstance(error.value, TypeError)  # the error of HF PEFT


def test_options_of_later_versions_are_named_in_one_warning(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "spam": 1, "eggs": 2}')
    with pytest.warns(UserWarning, match="unknown to this version: 'eggs', 'spam'; kept") as warned:
        PeftConfig.from_pretrained(tmp_path)
    assert len(warned) == 1


def test_none_is_false_where_an_option_is_true_or_false(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0"], fan_in_fan_out=None, use_dora=None)  # type: ignore[arg-type]
    assert config.fan_in_fan_out is False and config.use_dora is False
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": null'))
    assert PeftConfig.from_pretrained(tmp_path).fan_in_fan_out is False


def test_needed_options_may_be_assigned_later() -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens must be a positive integer"):
        peftcore.get_peft_model(nn.Linear(2, 2), PromptTuningConfig())
    with pytest.raises(ConfigError, match="target_modules is empty"):
        peftcore.get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=[]))
    config = LoraConfig(target_modules=[])
    config.target_modules = ["0"]
    assert peftcore.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config).active_adapter == "default"


def test_a_configuration_says_whether_it_is_of_a_prompt() -> None:
    """Libraries around HF PEFT ask for this, such as MLflow and Trainer."""
    for ours in (peftcore.LoraConfig(), peftcore.PrefixTuningConfig(num_virtual_tokens=2), peftcore.IA3Config()):
        theirs = getattr(peft, type(ours).__name__)()
        assert ours.is_prompt_learning == theirs.is_prompt_learning
        assert ours.is_adaption_prompt == theirs.is_adaption_prompt
    adaption = {"adapter_len": 2, "adapter_layers": 1, "target_modules": "x"}
    ours, theirs = peftcore.AdaptionPromptConfig(**adaption), peft.AdaptionPromptConfig(**adaption)
    assert ours.is_adaption_prompt and theirs.is_adaption_prompt
    assert ours.is_prompt_learning == theirs.is_prompt_learning
