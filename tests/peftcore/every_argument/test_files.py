"""Arguments of functions that read and write adapters and configurations."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from argument_checks import arguments_of, checks
from argument_nets import Plain, lora, net, same, tensors_of
from torch import Tensor, nn

import peftcore
from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peftcore.errors import AdapterNameError
from peftcore.files import hub
from peftcore.hf_peft import helpers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters: its own and `second`."""
    folder = tmp_path_factory.mktemp("saved")
    net("default", "second").save_pretrained(folder)
    return folder


# -- reading -----------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[..., Any]] = {
    "from_pretrained": lambda path, *args, **options: PeftModel.from_pretrained(Plain(), path, *args, **options),
    "load_adapter": lambda path, name="default", **options: _loaded(Plain(), path, name, **options),
}


def _loaded(plain: nn.Module, path: Any, name: str, **options: Any) -> Any:
    model = get_peft_model(plain, lora("1"), "first")
    model.load_adapter(path, name, **options)
    return model


READING = (
    "model_id adapter_name is_trainable autocast_adapter_dtype ephemeral_gpu_offload low_cpu_mem_usage key_mapping"
)


@checks("PeftModel.from_pretrained", f"{READING} config kwargs model")
@checks("PeftModel.load_adapter", f"{READING} kwargs")
@pytest.mark.parametrize("reader", READERS)
def test_reading_an_adapter(reader: str, saved: Path, tmp_path: Path) -> None:
    read = READERS[reader]
    values = tensors_of(read(saved, "b"), "b")
    assert not same(values, tensors_of(read(saved / "second", "b"), "b"))
    assert read(saved, "b", is_trainable=True).peft_config["b"].inference_mode is False
    assert read(saved, "b").peft_config["b"].inference_mode is True
    other = dataclasses.replace(PeftConfig.from_pretrained(saved), lora_alpha=64)
    assert read(saved, "b", config=other).peft_config["b"].lora_alpha == 64
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="ephemeral_gpu_offload"):
            read(saved, ephemeral_gpu_offload=True)
    for option in ("autocast_adapter_dtype", "low_cpu_mem_usage"):
        with pytest.raises(ConfigError, match=f"{option} must be True or False"):
            read(saved, **{option: "yes"})
    mapped = read(saved, "b", key_mapping={"^0": "0"})
    assert same(tensors_of(mapped, "b"), values)
    with pytest.raises(CheckpointError, match="missing"):
        read(saved, "b", key_mapping={"^0": "1"})
    assert same(tensors_of(read(saved, "b", subfolder="second"), "b"), tensors_of(read(saved / "second", "b"), "b"))
    with pytest.raises(TypeError, match="no option 'sub_folder'"):
        read(saved, sub_folder="second")
    with pytest.warns(UserWarning, match="device_map has no effect"):
        read(saved, device_map="auto")


@checks("PeftModel.from_pretrained", "autocast_adapter_dtype low_cpu_mem_usage model")
@checks("PeftModel.load_adapter", "autocast_adapter_dtype low_cpu_mem_usage torch_device kwargs")
def test_where_a_read_adapter_is(saved: Path) -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = PeftModel.from_pretrained(Plain(torch.bfloat16), saved, autocast_adapter_dtype=autocast)
        model.load_adapter(saved, "b", autocast_adapter_dtype=autocast)
        assert {t.dtype for name in ("default", "b") for t in tensors_of(model, name).values()} == {dtype}
    allocated: dict[bool, bool] = {}
    for low in (True, False):
        with _parameters_made_on_meta() as made:
            model = PeftModel.from_pretrained(Plain(), saved, low_cpu_mem_usage=low)
            model.load_adapter(saved, "b", low_cpu_mem_usage=low)
        allocated[low] = bool(made)
        assert not any(p.is_meta for p in model.parameters())
    assert allocated == {True: True, False: False}
    with pytest.raises(ConfigError, match="torch_device"):
        net().load_adapter(saved, "b", torch_device="no-such-device")
    with pytest.raises(TypeError, match="needs the base model first"):
        PeftModel.from_pretrained(saved, Plain())  # type: ignore[arg-type]


@contextlib.contextmanager
def _parameters_made_on_meta() -> Any:
    """Yield the list of the modules whose values `low_cpu_mem_usage` dropped."""
    from peftcore.injection import preparation

    made: list[nn.Module] = []
    original = preparation._forget_values

    def noting(module: nn.Module) -> None:
        made.append(module)
        original(module)

    preparation._forget_values = noting
    try:
        yield made
    finally:
        preparation._forget_values = original


@checks("PeftModel.load_adapter_weights", "directory adapter_name")
@checks("PeftModel.get_adapter_state_dict", "adapter_name state_dict")
@checks("load_peft_weights", "model_id device key_mapping hf_hub_download_kwargs")
@checks("check_if_peft_model", "model_name_or_path")
def test_tensors_of_a_directory(saved: Path, tmp_path: Path) -> None:
    model = net("default", "second")
    model.load_adapter_weights(saved / "second", "default")
    model.load_adapter_weights(saved, "second")
    swapped = tensors_of(PeftModel.from_pretrained(Plain(), saved / "second"))
    assert same(tensors_of(model, "default"), swapped) and not same(tensors_of(model, "second"), swapped)
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    taken = model.get_adapter_state_dict("second", state_dict=doubled)
    assert same(taken, {key: 2 * tensor for key, tensor in tensors_of(model, "second").items()})
    weights = peftcore.load_peft_weights(saved, device="cpu", key_mapping={r"^0\.": "9."})
    assert all(key.startswith("base_model.model.9.") for key in weights)
    assert {t.device.type for t in peftcore.load_peft_weights(saved, device="meta").values()} == {"meta"}
    in_folder = peftcore.load_peft_weights(saved, subfolder="second")
    assert same(in_folder, peftcore.load_peft_weights(saved / "second"))
    assert helpers.check_if_peft_model(str(saved)) and not helpers.check_if_peft_model(str(tmp_path))


# -- configurations ----------------------------------------------------------------------------------------------------


@checks("PeftConfig.from_dict", "values from_disk")
@checks("PeftConfig.from_pretrained", "pretrained_model_name_or_path subfolder kwargs")
@checks("PeftConfig.save_pretrained", "save_directory kwargs")
@checks("PeftConfig.from_peft_type", "kwargs")
@checks("PeftConfig.from_json_file", "path_json_file")
@checks("PeftConfig.check_saved", "values")
@checks("get_peft_config", "config_dict")
def test_configurations_on_disk(saved: Path, tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "r": 3}
    assert PeftConfig.from_dict(values) == peftcore.get_peft_config(values) == LoraConfig(r=3)
    with pytest.raises(ConfigError, match="unknown option 'rang'"):
        PeftConfig.from_dict({**values, "rang": 3})
    with pytest.warns(UserWarning, match="unknown to this version: 'rang'"):
        assert PeftConfig.from_dict({**values, "rang": 3}, from_disk=True).extra == {"rang": 3}
    LoraConfig(r=5).save_pretrained(tmp_path / "inner", auto_mapping_dict={"base_model_class": "B"})
    read = PeftConfig.from_pretrained(tmp_path, subfolder="inner")
    assert read.ranks() == [5] and read.auto_mapping == {"base_model_class": "B"}
    assert PeftConfig.from_json_file(tmp_path / "inner" / "adapter_config.json")["r"] == 5
    assert PeftConfig.from_json_file(saved / "adapter_config.json")["r"] == 2
    assert LoraConfig.from_peft_type(r=3) == PeftConfig.from_peft_type(**values) == LoraConfig(r=3)
    with pytest.raises(ConfigError, match="unknown option 'rang'"):
        LoraConfig.from_peft_type(rang=3)
    with pytest.raises(TypeError, match="no option 'push'"):
        LoraConfig().save_pretrained(tmp_path, push=True)
    with pytest.raises(TypeError, match="no option 'rang'"):
        PeftConfig.from_pretrained(saved, rang=3)
    with pytest.warns(UserWarning, match=r"r=3 has no effect, because adapter_config.json says 2; .*config.r = 3"):
        assert PeftConfig.from_pretrained(saved, r=3).ranks() == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftConfig.from_pretrained(saved, r=2, task_type=None)
        OFTConfig.check_saved({"use_cayley_neumann": True, "peft_version": "0.18.0"})
    with pytest.warns(UserWarning, match="no peft_version from 0.18 on"):
        OFTConfig.check_saved({"use_cayley_neumann": True, "peft_version": "0.17.1"})


PUSHED = "repo_id commit_message commit_description private token revision create_pr max_shard_size tags"


@checks("PeftConfig.push_to_hub", PUSHED)
@checks("PeftModel.push_to_hub", PUSHED)
def test_pushing_hands_every_option_to_the_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload itself, against a server: test_hub.py."""
    options: dict[str, Any] = {
        "commit_message": "m",
        "commit_description": "d",
        "private": True,
        "token": "t",
        "revision": "r",
        "create_pr": True,
        "max_shard_size": 7,
        "tags": ["x"],
    }
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(hub, "push", lambda repo, save, **given: calls.append((repo, given)))
    LoraConfig().push_to_hub("o/n", **options)
    net().push_to_hub("o/n", **options)
    assert calls == [("o/n", options)] * 2
    assert options.keys() | {"repo_id"} == arguments_of(PeftModel.push_to_hub) == set(PUSHED.split())


@checks("EvaConfig.__init__", "rho tau use_label_mask label_mask_value whiten adjust_scaling_factors")
@checks("LoraGAConfig.__init__", "direction scale stable_gamma")
@checks("LoftQConfig.__init__", "loftq_bits loftq_iter")
def test_options_of_starts_reach_the_configuration() -> None:
    """Their effects on the start: methods/lora/variants."""
    eva = {
        "rho": 3.0,
        "tau": 0.5,
        "use_label_mask": False,
        "label_mask_value": -1,
        "whiten": True,
        "adjust_scaling_factors": False,
    }
    given = {
        "eva": (peftcore.EvaConfig, eva),
        "lora_ga": (peftcore.LoraGAConfig, {"direction": "ArBr", "scale": "unit", "stable_gamma": 4}),
        "loftq": (peftcore.LoftQConfig, {"loftq_bits": 8, "loftq_iter": 2}),
    }
    for start, (kind, options) in given.items():
        for name, value in options.items():
            config = LoraConfig(init_lora_weights=start, **{f"{start}_config": kind(**{name: value})})
            plain = LoraConfig(init_lora_weights=start, **{f"{start}_config": kind()})
            assert getattr(config, f"{start}_config")[name] == value != getattr(plain, f"{start}_config")[name]


@checks("KasaConfig.__init__", "beta gamma")
@checks("VeloraConfig.__init__", "num_groups scale init_type")
@checks(
    "MontecloraConfig.__init__",
    "num_samples use_entropy dirichlet_prior sample_scaler kl_loss_weight buffer_size",
)
@checks("ArrowConfig.__init__", "top_k router_temperature use_gks rng_seed")
@checks("BdLoraConfig.__init__", "target_modules_bd_a target_modules_bd_b nblocks match_strict")
def test_options_of_variants_reach_the_configuration() -> None:
    """Their effects: methods/lora/variants."""
    samples = {
        "num_samples": 2,
        "use_entropy": True,
        "dirichlet_prior": 0.5,
        "sample_scaler": 0.5,
        "kl_loss_weight": 0.5,
        "buffer_size": 2,
    }
    blocks = {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["o"], "nblocks": 2, "match_strict": False}
    given: dict[str, Any] = {
        "kasa_config": (peftcore.KasaConfig, {"beta": 0.5, "gamma": 0.5}),
        "velora_config": (peftcore.VeloraConfig, {"num_groups": 2, "scale": 0.5, "init_type": "random"}),
        "monteclora_config": (peftcore.MontecloraConfig, samples),
        "use_bdlora": (peftcore.BdLoraConfig, blocks),
        "arrow_config": (
            peftcore.ArrowConfig,
            {"top_k": 2, "router_temperature": 0.5, "use_gks": True, "rng_seed": 3},
        ),
    }
    for field, (kind, options) in given.items():
        for name, value in options.items():
            config = LoraConfig(**{field: kind(**{name: value})})
            assert getattr(config, field)[name] == value != kind()[name]


@checks("_ConfigType.__call__", "args options")
def test_a_configuration_is_made_of_positions_and_fields_without_effect() -> None:
    assert LoraConfig("CAUSAL_LM", megatron_config=None) == LoraConfig(task_type="CAUSAL_LM")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown option 'megatron_config'"):
        LoraConfig(megatron_config={"a": 1})  # type: ignore[call-arg]


@checks("PeftConfig.check_beside", "other")
def test_what_stands_beside_is_looked_at() -> None:
    kasa = LoraConfig(kasa_config=peftcore.KasaConfig())
    kasa.check_beside(kasa)
    with pytest.raises(ConfigError, match="KaSA cannot be combined"):
        kasa.check_beside(LoraConfig())


def test_offloading_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its effect on a GPU: methods/lora/variants."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload=True needs a CUDA device"):
        peftcore.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload must be True or False"):
        peftcore.LoraRuntimeConfig(ephemeral_gpu_offload="yes")  # type: ignore[arg-type]


# -- saving ------------------------------------------------------------------------------------------------------------


@checks("PeftModel.save_pretrained", "save_directory safe_serialization selected_adapters is_main_process state_dict")
@checks("PeftModel.save_pretrained", "path_initial_model_for_weight_conversion other")
@checks("PeftModel.create_or_update_model_card", "output_dir")
def test_save_pretrained(tmp_path: Path) -> None:
    model = net("default", "second")
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["README.md", "second"]
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not list(tmp_path.glob("none/*"))
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "two", state_dict=doubled)
    read = PeftModel.from_pretrained(Plain(), tmp_path / "two")
    assert same(tensors_of(read), {key: 2 * tensor for key, tensor in tensors_of(model).items()})
    for options in (
        {"safe_serialization": False},
        {"push_to_hub": True},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            model.save_pretrained(tmp_path / "never", **options)
    model.save_pretrained(tmp_path / "wide", path_initial_model_for_weight_conversion=tmp_path / "two")
    assert PeftModel.from_pretrained(Plain(), tmp_path / "wide").peft_config["default"].r == 4
    with pytest.warns(UserWarning, match="max_shard_size='1KB' has no effect"):
        model.save_pretrained(tmp_path / "one", max_shard_size="1KB")
    with pytest.raises(TypeError, match="no option 'shards'"):
        model.save_pretrained(tmp_path / "never", shards=1)
    assert not (tmp_path / "never").exists()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nText\n")
    model.create_or_update_model_card(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


class Embedded(nn.Module):
    """An embedding with two layers after it, which transformers' conventions find."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(8, 6)
        self.lin = nn.Linear(6, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.embed_tokens(ids))


@checks("PeftModel.save_pretrained", "save_embedding_layers")
@checks("get_peft_model_state_dict", "model state_dict adapter_name unwrap_compiled save_embedding_layers")
def test_state_dicts_of_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(Embedded(), lora("lin"))
    for saves in (True, False):
        model.save_pretrained(tmp_path, save_embedding_layers=saves)
        on_disk = peftcore.load_peft_weights(tmp_path)
        state = peftcore.get_peft_model_state_dict(model, save_embedding_layers=saves)
        assert any("embed_tokens" in key for key in on_disk) is any("embed_tokens" in key for key in state) is saves
    model.add_adapter("b", lora("lin", r=3))
    second = peftcore.get_peft_model_state_dict(model, adapter_name="b")
    assert {3} == {min(tensor.shape) for tensor in second.values()}
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    assert same(
        peftcore.get_peft_model_state_dict(model, state_dict=doubled, adapter_name="b"),
        {key: 2 * tensor for key, tensor in second.items()},
    )
    compiled = nn.Module()  # the result of torch.compile, without the seconds that its import takes
    compiled._orig_mod = model
    assert same(peftcore.get_peft_model_state_dict(compiled, adapter_name="b", unwrap_compiled=True), second)
    with pytest.raises(AdapterNameError):
        peftcore.get_peft_model_state_dict(compiled, adapter_name="b")


@checks("set_peft_model_state_dict", "model peft_model_state_dict adapter_name ignore_mismatched_sizes")
@checks("set_peft_model_state_dict", "low_cpu_mem_usage")
@checks("set_base_model_state_dict", "model state_dict strict")
def test_writing_state_dicts() -> None:
    model, other = net("default", "b"), net("default", "b", r=3)
    state = peftcore.get_peft_model_state_dict(model, adapter_name="b")
    target = net("default", "b")
    peftcore.set_peft_model_state_dict(target, {key: 0 * tensor for key, tensor in state.items()}, "b")
    assert not any(tensor.any() for tensor in tensors_of(target, "b").values())
    assert all(tensor.any() for tensor in tensors_of(target, "default").values())
    with pytest.raises(CheckpointError, match="another configuration"):
        peftcore.set_peft_model_state_dict(other, state)
    with pytest.warns(UserWarning, match="another shape are skipped"):
        peftcore.set_peft_model_state_dict(other, state, ignore_mismatched_sizes=True)
    empty = get_peft_model(Plain(), lora(), low_cpu_mem_usage=True)
    peftcore.set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert same(peftcore.get_peft_model_state_dict(empty), state)
    base = {key: 2 * tensor for key, tensor in Plain().state_dict().items()}
    peftcore.set_base_model_state_dict(model, base)
    assert same(peftcore.get_base_model_state_dict(model), base)
    del base["0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing keys: \['0.bias'\]"):
        peftcore.set_base_model_state_dict(model, base)
    assert peftcore.set_base_model_state_dict(model, base, strict=False).missing_keys == ["0.bias"]
