"""Where the parameters of an adapter are and in which dtype: HF PEFT's options, compared with HF PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quantised_layers import quantised
from torch import Tensor, nn

import peftcore
from peftcore import ConfigError, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

TARGETS: Any = {"target_modules": ["0", "1"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "use_dora": True},
    "IA3Config": {"feedforward_modules": ["1"]},
    "VeraConfig": {"r": 2},
    "VBLoRAConfig": {"r": 2, "num_vectors": 16, "vector_length": 4},
    "UniLoraConfig": {"r": 2},
    "PeanutConfig": {"r": 2, "depth": 1},
    "PsoftConfig": {"r": 3},
    "BOFTConfig": {"boft_block_size": 4},
    "OFTConfig": {"oft_block_size": 4, "r": 0},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "HRAConfig": {"r": 2},
    "FourierFTConfig": {"n_frequency": 10},
}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


def dtypes(tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {key.removeprefix("base_model.model."): tensor.dtype for key, tensor in tensors.items()}


def own(model: Any, name: str = "default") -> dict[str, Tensor]:
    return model.get_adapter_state_dict(name)


def theirs(model: Any, name: str = "default") -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name=name)


# -- autocast_adapter_dtype -------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
def test_a_new_adapter_has_the_dtype_of_hf_pefts(kind: str, autocast: bool, dtype: torch.dtype) -> None:
    options = {**TARGETS, **OPTIONS[kind]}
    ours = get_peft_model(net(dtype), getattr(peftcore, kind)(**options), autocast_adapter_dtype=autocast)
    other = peft.get_peft_model(net(dtype), getattr(peft, kind)(**options), autocast_adapter_dtype=autocast)
    assert dtypes(own(ours)) == dtypes(theirs(other))
    assert set(dtypes(own(ours)).values()) == {torch.float32 if autocast else dtype}
    ours.add_adapter("more", getattr(peftcore, kind)(**options), autocast_adapter_dtype=autocast)
    other.add_adapter("more", getattr(peft, kind)(**options), autocast_adapter_dtype=autocast)
    assert dtypes(own(ours, "more")) == dtypes(theirs(other, "more"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_quantised_layers_the_dtype_is_hf_pefts(kind: str) -> None:
    found = []
    for library in (peftcore, peft):
        layer = quantised(kind)
        layer.compute_dtype = torch.bfloat16
        config = library.LoraConfig(r=2, target_modules=["0"])
        model = library.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False)
        found.append({p.dtype for p in model.parameters() if p.requires_grad})
    assert found[0] == found[1]


@HALVES
def test_an_adapter_of_16_bits_trains_and_merges(dtype: torch.dtype) -> None:
    model = get_peft_model(net(dtype), LoraConfig(r=2, bias="all", **TARGETS), autocast_adapter_dtype=False)
    x = torch.randn(4, 8, dtype=dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {dtype}
    before = model(x).float().square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    after = model(x)
    assert after.dtype == dtype and after.float().square().mean() < before
    torch.testing.assert_close(model.merge_and_unload()(x), after, rtol=0.05, atol=0.05)


@HALVES
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_loaded_adapter_has_the_dtype_of_hf_pefts(
    saved: torch.dtype, low_memory: bool, autocast: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, init_lora_weights=False, **TARGETS)
    get_peft_model(net(saved), config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    options: Any = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_memory}
    ours: Any = PeftModel.from_pretrained(net(dtype), tmp_path, **options)
    other = peft.PeftModel.from_pretrained(net(dtype), str(tmp_path), **options)
    assert dtypes(own(ours)) == dtypes(theirs(other))
    # HF PEFT's low_cpu_mem_usage rounds to the dtype of the layer, then casts to float32
    precision = torch.finfo(dtype).eps if low_memory else None
    value, other_value = own(ours)["0.lora_A.weight"], theirs(other)["base_model.model.0.lora_A.weight"]
    torch.testing.assert_close(value, other_value, rtol=precision, atol=None if precision is None else 0)
    ours.load_adapter(tmp_path, "more", **options)
    other.load_adapter(str(tmp_path), "more", **options)
    assert dtypes(own(ours, "more")) == dtypes(theirs(other, "more"))


def test_inject_adapter_in_model_keeps_the_dtype_of_the_layers_as_hf_pefts_does() -> None:
    ours: Any = inject_adapter_in_model(LoraConfig(r=2, **TARGETS), net(torch.bfloat16))
    other: Any = peft.inject_adapter_in_model(peft.LoraConfig(r=2, **TARGETS), net(torch.bfloat16))
    trained = [{p.dtype for p in model.parameters() if p.requires_grad} for model in (ours, other)]
    assert trained == [{torch.bfloat16}, {torch.bfloat16}]


# -- low_cpu_mem_usage ------------------------------------------------------------------------------------------------


def on_meta(model: nn.Module) -> set[str]:
    return {name.rpartition("lora_")[2][0] for name, p in model.named_parameters() if p.is_meta}


def test_a_new_adapter_without_memory_reads_a_saved_one(tmp_path: Path) -> None:
    config = LoraConfig(r=2, init_lora_weights=False, modules_to_save=["1"], target_modules=["0"])
    trained = get_peft_model(net(), config)
    trained.save_pretrained(tmp_path)
    other = peft.get_peft_model(
        net(), peft.LoraConfig(r=2, modules_to_save=["1"], target_modules=["0"]), low_cpu_mem_usage=True
    )
    model = get_peft_model(net(), config, low_cpu_mem_usage=True)
    assert on_meta(model) == on_meta(other) == {"A", "B"}
    with pytest.raises(
        peftcore.CheckpointError,
        match=r"'default' has no values here.*After low_cpu_mem_usage=True, read a saved adapter",
    ):
        model.save_pretrained(tmp_path / "none")
    model.load_adapter_weights(tmp_path)
    x = torch.randn(3, 8)
    assert on_meta(model) == set()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in trained.parameters()]
    torch.testing.assert_close(model(x), trained(x))
    model.add_adapter("more", config, low_cpu_mem_usage=True)
    assert on_meta(model) == {"A", "B"}
    injected = inject_adapter_in_model(config, net(), low_cpu_mem_usage=True)
    assert on_meta(injected) == {"A", "B"}


@pytest.mark.parametrize("kind", OPTIONS)
def test_loading_without_memory_gives_the_same_adapter(kind: str, tmp_path: Path) -> None:
    options = {**TARGETS, **OPTIONS[kind]}
    trained = get_peft_model(net(), getattr(peftcore, kind)(**options))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    x = torch.randn(3, 8)
    assert not any(p.is_meta for p in loaded.parameters())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in trained.parameters()]
    torch.testing.assert_close(loaded.eval()(x), PeftModel.from_pretrained(net(), tmp_path)(x))


# -- other options ----------------------------------------------------------------------------------------------------


def test_the_revision_of_the_base_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(**TARGETS), revision="v1")
    assert model.peft_config["default"].revision == "v1"
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).revision == "v1"
    config = LoraConfig(revision="v0", **TARGETS)
    with pytest.warns(UserWarning, match="revision='v1' is used in place of the configuration's 'v0'"):
        model = get_peft_model(net(), config, revision="v1")
    assert model.peft_config["default"].revision == "v1" and config.revision == "v0"


def test_the_name_of_the_base_is_in_the_configuration_as_with_hf_peft() -> None:
    configs = []
    for library in (peftcore, peft):
        base: Any = net()
        base.name_or_path = "owner/base"
        model = library.get_peft_model(base, library.LoraConfig(**TARGETS))
        configs.append(model.peft_config["default"])
    assert [config.base_model_name_or_path for config in configs] == ["owner/base"] * 2
    base = net()
    base.name_or_path = "/tmp/copy"
    model = get_peft_model(base, LoraConfig(base_model_name_or_path="owner/base", **TARGETS))
    assert model.peft_config["default"].base_model_name_or_path == "owner/base"  # what the user has stated


def test_a_configuration_that_is_given_becomes_the_adapters_own(tmp_path: Path) -> None:
    get_peft_model(net(), LoraConfig(**TARGETS)).save_pretrained(tmp_path)
    for library in (peftcore, peft):
        config = library.LoraConfig(**TARGETS)
        model = library.PeftModel.from_pretrained(net(), str(tmp_path), config=config)
        assert model.peft_config["default"] is config and config.inference_mode


@pytest.mark.parametrize("option", ["mixed", "autocast_adapter_dtype", "low_cpu_mem_usage"])
def test_a_flag_must_be_true_or_false(option: str) -> None:
    options: Any = {option: "no"}
    with pytest.raises(ConfigError, match=f"{option} must be True or False; got 'no'"):
        get_peft_model(net(), LoraConfig(**TARGETS), **options)


def test_methods_mix_with_and_without_mixed() -> None:
    for mixed in (True, False):
        model = get_peft_model(net(), LoraConfig(**TARGETS), mixed=mixed)
        model.add_adapter("other", peftcore.LoHaConfig(**TARGETS))
        model.set_adapter(["default", "other"])
        assert list(model.active_adapters) == ["default", "other"]


def test_injection_after_the_keys_of_a_state_dict() -> None:
    trained = get_peft_model(net(), LoraConfig(target_modules=["1"]))
    for keys in (own(trained), theirs(peft.get_peft_model(net(), peft.LoraConfig(target_modules=["1"])))):
        with pytest.warns(RuntimeWarning, match="adapts the 1 layers that state_dict names"):
            model: Any = inject_adapter_in_model(LoraConfig(target_modules=["0"]), net(), state_dict=keys)
        names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert names == {"1"}
    with pytest.raises(peftcore.TargetError, match=r"names no layer of this Sequential; it holds '7\.lora_A\.weight'"):
        inject_adapter_in_model(LoraConfig(), net(), state_dict={"7.lora_A.weight": torch.zeros(1)})


def test_the_former_name_of_an_argument_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="the argument 'config' is now 'peft_config'"):
        inject_adapter_in_model(config=LoraConfig(**TARGETS), model=net())  # type: ignore[call-arg]


def test_saving_names_the_class_of_the_base_as_hf_peft_does(tmp_path: Path) -> None:
    get_peft_model(net(), LoraConfig(**TARGETS)).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(net(), peft.LoraConfig(**TARGETS)).save_pretrained(str(tmp_path / "theirs"))
    ours, other = (peft.PeftConfig.from_pretrained(str(tmp_path / name)).auto_mapping for name in ("ours", "theirs"))
    assert ours == other == {"base_model_class": "Sequential", "parent_library": "torch.nn.modules.container"}
