"""No argument of the public API is ignored: each has an effect, or a warning or an error says why not.

Each test varies the arguments that its `@checks` names, and asserts a difference. A new argument without a test fails
`test_every_argument_is_varied_by_a_test`.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from argument_checks import CHECKED, arguments_of, checks, public_functions, refused_names
from torch import Tensor, nn

import peftcore
from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    hub,
    inject_adapter_in_model,
)
from peftcore.errors import AdapterNameError, AdapterStoreError, ExportError, PeftError
from peftcore.hf_peft import functional, helpers, optimizers
from peftcore.hf_peft.classes import BaseTunerLayer
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging import Recipe

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def lora(*targets: str, **options: Any) -> LoraConfig:
    fixed = {"r": 2, "target_modules": list(targets or ("0",)), "init_lora_weights": False}
    return LoraConfig(**{**fixed, **options})


class Plain(nn.Sequential):
    """Two layers, which take a further argument."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6))
        self.to(dtype)

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return super().forward(x) * times


def net(*names: str, **options: Any) -> Any:
    """A net with LoRAs; those after the first are not active."""
    model = get_peft_model(Plain(), lora(**options), *names[:1])
    for name in names[1:]:
        model.add_adapter(name, lora(**options))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters: its own and `second`."""
    folder = tmp_path_factory.mktemp("saved")
    net("default", "second").save_pretrained(folder)
    return folder


def tensors_of(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.get_adapter_state_dict(name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_argument_is_varied_by_a_test() -> None:
    unchecked = {
        f"{name}({argument})"
        for name, function in public_functions().items()
        for argument in arguments_of(function) - CHECKED.get(name, set())
    }
    assert not unchecked
    gone = {name: left for name, arguments in CHECKED.items() if (left := arguments - _known(name))}
    assert not gone, "tests name arguments that no function has"


def _known(name: str) -> set[str]:
    function = public_functions().get(name)
    return set() if function is None else arguments_of(function)


@pytest.mark.parametrize("name", refused_names())
def test_a_name_without_its_method_is_refused_with_any_arguments(name: str) -> None:
    with pytest.raises(PeftError, match=r"^\w+: .{20}"):
        getattr(peftcore, name)(1, option=2)


# -- making a model ---------------------------------------------------------------------------------------------------


@checks("get_peft_model", "model peft_config adapter_name mixed revision")
def test_get_peft_model() -> None:
    plain = Plain()
    model = get_peft_model(plain, lora("1"), "other", mixed=True, revision="v2")
    assert model is plain and list(model.peft_config) == ["other"] == model.active_adapters
    assert list(adapter_set(model).layers) == ["1"] and model.peft_config["other"].revision == "v2"
    assert isinstance(model, peftcore.PeftMixedModel) and not isinstance(net(), peftcore.PeftMixedModel)
    with pytest.raises(ConfigError, match="mixed must be True or False"):
        get_peft_model(Plain(), lora(), mixed="yes")  # type: ignore[arg-type]


@checks("get_peft_model", "autocast_adapter_dtype low_cpu_mem_usage")
@checks("PeftModel.add_adapter", "adapter_name peft_config autocast_adapter_dtype low_cpu_mem_usage")
@checks("inject_adapter_in_model", "peft_config model adapter_name low_cpu_mem_usage state_dict")
@checks("TunerModel.__init__", "model config adapter_name")
def test_new_adapters() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(Plain(torch.bfloat16), lora(), autocast_adapter_dtype=autocast)
        model.add_adapter("b", lora("1"), autocast_adapter_dtype=autocast)
        assert {t.dtype for name in ("default", "b") for t in tensors_of(model, name).values()} == {dtype}
    for low in (True, False):
        model = get_peft_model(Plain(), lora(), low_cpu_mem_usage=low)
        model.add_adapter("b", lora("1"), low_cpu_mem_usage=low)
        injected = inject_adapter_in_model(lora("1"), Plain(), "c", low_cpu_mem_usage=low)
        parameters = [p for m in (model, injected) for n, p in m.named_parameters() if "lora_" in n]
        assert len(parameters) == 6 and {p.is_meta for p in parameters} == {low}
    plain = Plain()
    state = {key.replace("0.", "1."): tensor for key, tensor in tensors_of(net()).items()}
    assert inject_adapter_in_model(lora("0"), plain, "c", state_dict=state) is plain
    assert list(adapter_set(plain).layers) == ["1"] and list(adapter_set(plain).configs) == ["c"]
    with pytest.raises(ConfigError, match="add_adapter takes a name and a configuration"):
        net().add_adapter("b", "c")
    view = peftcore.LoraModel(plain := Plain(), lora("1"), "d")
    assert view.model is plain and list(view.peft_config) == ["d"] and view.targeted_module_names == ["1"]


@checks("_TaskClass.__call__", "model peft_config adapter_name kwargs")
@checks("_Mixed.__call__", "model peft_config adapter_name")
@checks("_Wrapper.__call__", "args kwargs")
def test_classes_of_tasks() -> None:
    model = peftcore.PeftModelForCausalLM(plain := Plain(), lora("1"), "b", revision="v3")
    assert model is plain and isinstance(model, peftcore.PeftModelForCausalLM)
    assert model.peft_config["b"].revision == "v3" and list(adapter_set(model).layers) == ["1"]
    mixed = peftcore.PeftMixedModel(plain := Plain(), lora("1"), "b")
    assert mixed is plain and isinstance(mixed, peftcore.PeftMixedModel) and list(mixed.peft_config) == ["b"]
    for arguments, options in (((1,), {}), ((), {"size": 1})):
        with pytest.raises(PeftError, match="cannot be made by itself"):
            peftcore.PromptEmbedding(*arguments, **options)


# -- reading ----------------------------------------------------------------------------------------------------------

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


# -- configurations ---------------------------------------------------------------------------------------------------


@checks("PeftConfig.from_dict", "values from_disk")
@checks("PeftConfig.from_pretrained", "pretrained_model_name_or_path subfolder kwargs")
@checks("PeftConfig.save_pretrained", "save_directory kwargs")
@checks("get_peft_config", "config_dict")
def test_configurations_on_disk(saved: Path, tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "r": 3}
    assert PeftConfig.from_dict(values) == peftcore.get_peft_config(values) == LoraConfig(r=3)
    with pytest.raises(ConfigError, match="unknown option 'rang'"):
        PeftConfig.from_dict({**values, "rang": 3})
    with pytest.warns(UserWarning, match="'rang' is unknown to this version"):
        assert PeftConfig.from_dict({**values, "rang": 3}, from_disk=True).extra == {"rang": 3}
    LoraConfig(r=5).save_pretrained(tmp_path / "inner", auto_mapping_dict={"base_model_class": "B"})
    read = PeftConfig.from_pretrained(tmp_path, subfolder="inner")
    assert read.ranks() == [5] and read.auto_mapping == {"base_model_class": "B"}
    with pytest.raises(TypeError, match="no option 'push'"):
        LoraConfig().save_pretrained(tmp_path, push=True)
    with pytest.raises(TypeError, match="'r'"):
        PeftConfig.from_pretrained(saved, r=3)


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
@checks("LoraRuntimeConfig.__init__", "ephemeral_gpu_offload")
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
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload is not supported"):
        peftcore.LoraRuntimeConfig(ephemeral_gpu_offload=True)


# -- activation -------------------------------------------------------------------------------------------------------

SETTERS: dict[str, Callable[..., None]] = {
    "model": lambda model, *args, **options: model.set_adapter(*args, **options),
    "view": lambda model, *args, **options: model.base_model.set_adapter(*args, **options),
    "function": functional.set_adapter,
}


@checks("PeftModel.set_adapter", "adapter_name inference_mode")
@checks("TunerModel.set_adapter", "adapter_name inference_mode")
@checks("set_adapter", "model adapter_name inference_mode layer_cls")
@pytest.mark.parametrize("setter", SETTERS.values(), ids=list(SETTERS))
def test_set_adapter(setter: Callable[..., None]) -> None:
    model = net("a", "b")
    setter(model, "b")
    assert model.active_adapters == ["b"] and trained(model) == {f"0.adapters.b.lora_{f}" for f in "AB"}
    setter(model, ["b", "a"], inference_mode=True)
    assert model.active_adapters == ["b", "a"] and not trained(model)
    if setter is functional.set_adapter:
        with pytest.raises(ConfigError, match="layer_cls must be BaseTunerLayer"):
            setter(model, "a", layer_cls=nn.Linear)
        setter(model, "a", layer_cls=BaseTunerLayer)


@checks("PeftModel.set_requires_grad", "adapter_names requires_grad")
@checks("set_requires_grad", "model adapter_names requires_grad")
@pytest.mark.parametrize("setter", [PeftModel.set_requires_grad, functional.set_requires_grad])
def test_set_requires_grad(setter: Any) -> None:
    model = net("a", "b")
    setter(model, "b")
    assert len(trained(model)) == 4
    setter(model, ["a"], requires_grad=False)
    assert trained(model) == {f"0.adapters.b.lora_{f}" for f in "AB"}


@checks("PeftModel.delete_adapter", "adapter_name")
@checks("TunerModel.delete_adapter", "adapter_name")
@checks("delete_adapter", "model adapter_name prefix layer_cls")
def test_delete_adapter() -> None:
    model = net("a", "b", "c", "d", "e")
    model.delete_adapter(["b", "c"])
    model.base_model.delete_adapter("d")
    with pytest.raises(ConfigError, match="none with prefix 'ia3_'"):
        functional.delete_adapter(model, "e", prefix="ia3_")
    with pytest.raises(ConfigError, match="layer_cls must be BaseTunerLayer"):
        functional.delete_adapter(model, "e", layer_cls=nn.Linear)
    assert functional.delete_adapter(model, "e", prefix="lora_", layer_cls=BaseTunerLayer) == ["a"]
    assert list(model.peft_config) == ["a"]


@checks("PeftModel.__call__", "args adapter_names kwargs")
@checks("PeftModel.route", "adapters")
@checks("rescale_adapter_scale", "model multiplier")
@checks("disable_input_dtype_casting", "model active")
def test_calls() -> None:
    model = net("a", "b")
    with model.route("b"):
        expected = model(X)
    assert torch.equal(model(X, adapter_names="b"), expected) and not torch.equal(model(X), expected)
    assert torch.equal(model(X, times=2.0), 2 * model(X)) and not torch.equal(model(2 * X), model(X))
    with model.disable_adapter():
        base = model(X)
    with helpers.rescale_adapter_scale(model, 0):
        torch.testing.assert_close(model(X), base)
    for active in (True, False):
        with helpers.disable_input_dtype_casting(model, active):
            assert torch.equal(model(X, adapter_names="b"), expected)
    with pytest.raises(TypeError, match="active must be True or False"), helpers.disable_input_dtype_casting(model, 3):
        pass
    with pytest.raises(AdapterNameError, match="has no adapters"), helpers.disable_input_dtype_casting(Plain()):
        pass


@checks("_has_own_signature", "model method")
def test_signatures() -> None:
    helpers.update_signature(net(), "forward")
    with pytest.raises(ValueError, match="method must be"):
        helpers.update_signature(net(), "backward")
    with pytest.raises(AdapterNameError, match="has no adapters"):
        helpers.update_signature(Plain())


@checks("PeftLayerAttributes.get_delta_weight", "adapter")
@checks("PeftLayerAttributes.set_scale", "adapter scale")
@checks("PeftLayerAttributes.scale_layer", "scale")
@checks("PeftLayerAttributes.unscale_layer", "scale")
def test_methods_of_layers() -> None:
    model = net("a", "b")
    layer = model[0]
    changes = {name: layer.get_delta_weight(name) for name in "ab"}
    assert not torch.equal(changes["a"], changes["b"])
    layer.set_scale("b", 3)
    torch.testing.assert_close(layer.get_delta_weight("b"), 3 * changes["b"])
    layer.scale_layer(6)
    torch.testing.assert_close(layer.get_delta_weight("a"), 6 * changes["a"])
    layer.unscale_layer(2)
    torch.testing.assert_close(layer.get_delta_weight("a"), 3 * changes["a"])
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("a"), changes["a"])


@checks("refresh_adapters", "model")
@checks("get_layer_status", "model")
@checks("get_model_status", "model")
@checks("get_base_model_state_dict", "model")
@checks("check_mergeable", "model adapter_names")
@checks("PeftModel.enable_peft_hotswap", "args kwargs")
def test_functions_of_a_model_alone(tmp_path: Path) -> None:
    model = net("a", "b")
    with torch.no_grad():
        before = model(X)
        model[0].adapters["a"].lora_A.data.mul_(2)
        peftcore.refresh_adapters(model)
        assert not torch.equal(model(X), before)
    assert len(peftcore.get_layer_status(model)) == 1
    assert peftcore.get_model_status(model).available_adapters == ["a", "b"]
    assert same(peftcore.get_base_model_state_dict(model), dict(Plain().state_dict()))
    model.add_adapter("c", lora(alora_invocation_tokens=[1]))
    peftcore.check_mergeable(model, ["a", "b"])
    with pytest.raises(MergeError):
        peftcore.check_mergeable(model, ["a", "c"])
    for arguments, options in (((1,), {}), ((), {"target_rank": 4})):
        with pytest.raises(ConfigError, match="load_adapter_weights"):
            model.enable_peft_hotswap(*arguments, **options)
    for function in (peftcore.refresh_adapters, peftcore.get_layer_status):
        with pytest.raises(PeftError, match="get_peft_model first"):
            function(Plain())


# -- merging ----------------------------------------------------------------------------------------------------------

MERGERS: dict[str, Callable[..., Any]] = {
    "model": lambda model, **options: model.merge_adapter(**options),
    "view": lambda model, **options: model.base_model.merge_adapter(**options),
    "unloading": lambda model, **options: model.merge_and_unload(**options),
}


@checks("PeftModel.merge_adapter", "adapter_names safe_merge")
@checks("TunerModel.merge_adapter", "adapter_names safe_merge")
@checks("PeftModel.merge_and_unload", "adapter_names safe_merge")
@pytest.mark.parametrize("merge", MERGERS.values(), ids=list(MERGERS))
def test_merging(merge: Callable[..., Any]) -> None:
    model = net("a", "b")
    with torch.no_grad():
        expected = model(X, adapter_names="b")
        merge(model, adapter_names=["b"])
        if isinstance(model, PeftModel):
            model = model.merge_and_unload(adapter_names=["b"])
        torch.testing.assert_close(model(X), expected)
        broken = net("a")
        broken[0].adapters["a"].lora_A.fill_(float("nan"))
        with pytest.raises(MergeError, match="NaN or Inf"):
            merge(broken, safe_merge=True)
        merge(broken, safe_merge=False)
        assert broken(X).isnan().any()


@checks("PeftModel.merge_and_unload", "progressbar")
def test_progress_of_a_merge(capfd: pytest.CaptureFixture[str]) -> None:
    net().merge_and_unload(progressbar=False)
    assert not capfd.readouterr().err
    net().merge_and_unload(progressbar=True)
    assert "merge" in capfd.readouterr().err


@checks("PeftModel.add_merged", "adapter_name weights recipe rank")
def test_add_merged() -> None:
    model = net("a", "b")
    for name, options in {
        "m": {},
        "w": {"weights": {"a": 1.0, "b": 2.0}},
        "t": {"recipe": Recipe.ties(density=0.5), "rank": 2},
    }.items():
        model.add_merged(name, **{"weights": {"a": 1.0, "b": 1.0}, "recipe": Recipe.linear(), **options})
    with torch.no_grad():
        outputs = [model(X, adapter_names=name) for name in "mwt"]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert model.adapter_ranks("t") == {"0": 2} and model.adapter_ranks("m") == {"0": 4}


WEIGHTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adapters": ({}, {"adapters": ["a", "a2"]}),
    "weights": ({}, {"weights": [2.0, 1.0]}),
    "combination_type": ({}, {"combination_type": "linear"}),
    "svd_rank": ({}, {"svd_rank": 1}),
    "svd_clamp": ({}, {"svd_clamp": 0.6}),
    "density": ({"combination_type": "ties", "density": 0.9}, {"density": 0.3}),
    "majority_sign_method": (
        {"combination_type": "ties", "density": 0.9, "weights": [0.3, 2.0]},
        {"majority_sign_method": "frequency"},
    ),
}


@checks("PeftModel.add_weighted_adapter", " ".join(WEIGHTED))
@pytest.mark.parametrize("argument", WEIGHTED)
def test_add_weighted_adapter(argument: str) -> None:
    fixed, changed = WEIGHTED[argument]
    model = net("a", "b", "a2")
    first = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "combination_type": "svd", **fixed}
    model.add_weighted_adapter(adapter_name="one", **first)
    model.add_weighted_adapter(adapter_name="two", **{**first, **changed})
    assert not same(tensors_of(model, "one"), tensors_of(model, "two"))


@checks("PeftModel.add_weighted_adapter", "adapter_name svd_full_matrices svd_driver")
def test_add_weighted_adapter_with_options_of_the_decomposition() -> None:
    """They choose how the same factors are computed, so other values are errors."""
    model = net("a", "b")
    for option in ({"svd_driver": "no-such-driver"}, {"svd_full_matrices": "yes"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", **option)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="svd_driver has no effect"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", svd_driver="gesvd")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n", svd_full_matrices=False)
    assert {"m", "n"} < model.peft_config.keys()
    for option in ({"svd_rank": 2}, {"svd_clamp": 0.9}, {"density": 0.5}, {"majority_sign_method": "frequency"}):
        with pytest.warns(UserWarning, match=f"'linear': {next(iter(option))} has no effect"):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "l", "linear", **option)  # type: ignore[arg-type]
        model.delete_adapter("l")


# -- saving -----------------------------------------------------------------------------------------------------------


@checks("PeftModel.save_pretrained", "save_directory safe_serialization selected_adapters is_main_process state_dict")
@checks("PeftModel.save_pretrained", "path_initial_model_for_weight_conversion other")
@checks("PeftModel.create_or_update_model_card", "output_dir")
def test_save_pretrained(tmp_path: Path) -> None:
    model = net("default", "second")
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["second"]
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not list(tmp_path.glob("none/*"))
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "two", state_dict=doubled)
    read = PeftModel.from_pretrained(Plain(), tmp_path / "two")
    assert same(tensors_of(read), {key: 2 * tensor for key, tensor in tensors_of(model).items()})
    for options in (
        {"safe_serialization": False},
        {"path_initial_model_for_weight_conversion": tmp_path},
        {"max_shard_size": "1KB"},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            model.save_pretrained(tmp_path / "never", **options)
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
    with pytest.raises(RuntimeError, match=r"lacks \['0.bias'\]"):
        peftcore.set_base_model_state_dict(model, base)
    assert peftcore.set_base_model_state_dict(model, base, strict=False).missing_keys == ["0.bias"]


# -- training ---------------------------------------------------------------------------------------------------------


def adalora() -> Any:
    options = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4}
    return get_peft_model(Plain(), peftcore.AdaLoraConfig(target_modules=["0", "1"], **options))


@checks("PeftModel.on_optimizer_step", "step optimizer")
@checks("PeftModel.load_adapter_state", "state")
@checks("PeftModel.adapter_ranks", "adapter_name")
def test_steps_of_training() -> None:
    widths = {}
    for with_optimizer in (False, True):
        model = adalora()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in (1, 2, 3):
            model(X).square().sum().backward()
            optimizer.step()
            if step == 3:
                before = sum(model.adapter_ranks().values())
            model.on_optimizer_step(step, optimizer if with_optimizer else None)
        widths[with_optimizer] = sum(p.numel() for p in model.parameters())
        state = {
            key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in model.adapter_state().items()
        }
        model.load_adapter_state(state)
        assert same(model.adapter_state(), state)
        assert sum(model.adapter_ranks("default").values()) <= before
    assert widths[True] < widths[False]
    model = net("a")
    model.add_adapter("b", lora("1", r=5))
    assert model.adapter_ranks("b") == {"1": 5} != model.adapter_ranks()


@checks("PeftModel.supports_lora_conversion", "adapter_name")
@checks("PeftModel.get_prompt_embedding_to_save", "adapter_name")
@checks("PeftModel.prepare_model_for_gradient_checkpointing", "model")
@checks("prepare_model_for_kbit_training", "model use_gradient_checkpointing gradient_checkpointing_kwargs")
def test_transformers_models() -> None:
    from routed_models import llama

    model = get_peft_model(llama(torch.bfloat16), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "p")
    model.add_adapter("l", lora("q_proj"))
    assert model.get_prompt_embedding_to_save("p").shape[0] == 3
    with pytest.raises(ConfigError, match="'l' is not a prompt"):
        model.get_prompt_embedding_to_save("l")
    assert model.supports_lora_conversion("l") and not model.supports_lora_conversion("p")
    other = llama()
    assert not other.get_input_embeddings()(torch.tensor([1])).requires_grad or other.requires_grad_(False) is other
    assert model.prepare_model_for_gradient_checkpointing(other) is other
    assert other.get_input_embeddings()(torch.tensor([1])).requires_grad
    for checkpoints in (False, True):
        prepared: Any = peftcore.prepare_model_for_kbit_training(llama(torch.bfloat16), checkpoints)
        assert prepared.is_activation_checkpointing is checkpoints and prepared.dtype == torch.float32
    with pytest.warns(UserWarning, match="reentrant checkpointing"):
        peftcore.prepare_model_for_kbit_training(llama(), True, {"use_reentrant": True})


@checks("cast_mixed_precision_params", "model dtype")
@checks("cast_adapter_dtype", "model adapter_name autocast_adapter_dtype")
@checks("shift_tokens_right", "input_ids pad_token_id decoder_start_token_id")
def test_precision_and_tokens() -> None:
    model = net("a", "b")
    peftcore.cast_mixed_precision_params(model, torch.float16)
    assert {p.dtype for n, p in model.named_parameters() if ".a." in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".b." in n} == {torch.float16}
    functional.cast_adapter_dtype(model, "b", autocast_adapter_dtype=False)
    assert {t.dtype for t in tensors_of(model, "b").values()} == {torch.float16}
    functional.cast_adapter_dtype(model, "b")
    assert {t.dtype for t in tensors_of(model, "b").values()} == {torch.float32}
    labels = torch.tensor([[4, -100, 6]])
    assert peftcore.shift_tokens_right(labels, 9, 2).tolist() == [[2, 4, 9]]
    assert peftcore.shift_tokens_right(labels + 1, 0, 3).tolist() == [[3, 5, -99]]


@checks("create_lorafa_optimizer", "model r lora_alpha lr weight_decay use_rslora")
@checks("create_loraplus_optimizer", "model optimizer_cls lr loraplus_lr_ratio kwargs")
@checks("create_riemannian_optimizer", "args kwargs")
def test_optimizers() -> None:
    model = net("a")
    for wrong in ({"r": 4}, {"lora_alpha": 9}, {"use_rslora": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            optimizers.create_lorafa_optimizer(model, **{"r": 2, "lora_alpha": 8, "lr": 0.1, **wrong})
    fa = optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1, weight_decay=0.5)
    assert {(g["lr"], g["weight_decay"]) for g in fa.param_groups} == {(0.1, 0.5)}
    model = net("a")
    plus = optimizers.create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, loraplus_weight_decay=0.2, momentum=0.3
    )
    assert isinstance(plus, torch.optim.SGD) and {round(g["lr"], 3) for g in plus.param_groups} == {0.1, 0.4}
    assert {(g["momentum"], g["weight_decay"]) for g in plus.param_groups} == {(0.3, 0.2)}
    for arguments, options in (((model,), {}), ((), {"lr": 0.1})):
        with pytest.raises(ConfigError, match="does not have this optimiser"):
            optimizers.create_riemannian_optimizer(*arguments, **options)


class WithLoss(Plain):
    """A net whose call takes a batch by name."""

    def forward(self, x: Tensor, times: float = 1.0, label_ids: Tensor | None = None) -> Tensor:
        return super().forward(x, times)


DATA_START = "model adapter_name"


@checks("initialize_from_data", f"{DATA_START} batches forward progress")
@checks("initialize_lora_eva_weights", f"{DATA_START} dataloader forward_fn show_progress_bar")
@checks("initialize_lora_eva_weights", "eva_state_dict prepare_model_inputs_fn prepare_layer_inputs_fn")
@checks("initialize_lora_eva_weights", "gather_distributed_inputs")
@pytest.mark.parametrize("function", [peftcore.initialize_from_data, peftcore.initialize_lora_eva_weights])
def test_starts_from_data(function: Any, capfd: pytest.CaptureFixture[str]) -> None:
    is_eva = function is peftcore.initialize_lora_eva_weights
    batches, forward, progress = (
        ("dataloader", "forward_fn", "show_progress_bar") if is_eva else ("batches", "forward", "progress")
    )
    generator = torch.Generator().manual_seed(3)
    data = [{"x": torch.randn(40, 6, generator=generator)} for _ in range(3)]

    def started(rows: Any, name: str = "b", **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(Plain(), lora("0"), "a")
        torch.manual_seed(0)
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva"))
        function(model, **{batches: rows, "adapter_name": name, **options})
        return tensors_of(model, "b")

    plain = started(data, **{progress: False})
    assert not capfd.readouterr().err.strip()
    assert same(started(data), plain) and capfd.readouterr().err
    assert not same(started([{"x": one["x"] ** 2} for one in data]), plain)
    assert same(started([{"y": one["x"]} for one in data], **{forward: lambda model, one: model(one["y"])}), plain)
    with pytest.raises(ConfigError, match="'a' needs no data"):
        started(data, "a")
    if is_eva:
        for option in ("eva_state_dict", "prepare_model_inputs_fn", "prepare_layer_inputs_fn"):
            with pytest.raises(ConfigError, match=option):
                started(data, **{option: {}})
        with pytest.raises(ConfigError, match="gather_distributed_inputs"):
            started(data, gather_distributed_inputs=False)


@checks("replace_lora_weights_loftq", "model weights adapter_name callback")
def test_loftq_on_a_quantised_base() -> None:
    from quantised_layers import quantised

    torch.manual_seed(0)
    original = {"0.weight": torch.randn(32, 64)}
    model = get_peft_model(nn.Sequential(quantised("nf4")), lora("0"), "a")
    model.add_adapter("b", lora("0"))
    before = {name: tensors_of(model, name) for name in "ab"}
    seen: list[str] = []
    peftcore.replace_lora_weights_loftq(model, original, "b", lambda _, path: seen.append(path) is not None)
    assert seen == ["0"] and same(tensors_of(model, "b"), before["b"]), "the callback refused the layer"
    peftcore.replace_lora_weights_loftq(model, original, "b")
    assert same(tensors_of(model, "a"), before["a"]) and not same(tensors_of(model, "b"), before["b"])
    first = tensors_of(model, "b")
    peftcore.replace_lora_weights_loftq(model, {"0.weight": 2 * original["0.weight"]}, "b")
    assert not same(tensors_of(model, "b"), first)


# -- conversion and export --------------------------------------------------------------------------------------------


@checks("convert_to_lora", "model adapter_name new_name rank tolerance is_trainable")
@checks("save_as_lora", "model directory adapter_name rank tolerance")
def test_conversion_to_lora(tmp_path: Path) -> None:
    model = net("default")
    model.add_adapter("h", peftcore.LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    convert = peftcore.convert_to_lora
    assert convert(model, "default", "exact").ranks == {"0": 2}
    assert convert(model, "h", "small", rank=1, is_trainable=True).ranks == {"0": 1}
    assert trained(model) >= {f"0.adapters.small.lora_{f}" for f in "AB"} and not any(
        "exact" in n for n in trained(model)
    )
    loose, tight = (convert(model, "h", f"t{t}", tolerance=t / 10).ranks["0"] for t in (8, 1))
    assert loose < tight
    for number, options in enumerate(({}, {"adapter_name": "h", "rank": 1}, {"adapter_name": "h", "tolerance": 0.1})):
        ranks = peftcore.save_as_lora(model, tmp_path / str(number), **options).ranks
        assert ranks == {"0": (2, 1, tight)[number]}
        assert PeftConfig.from_pretrained(tmp_path / str(number)).peft_type == "LORA"


@checks("convert_directory_to_lora", "source directory")
def test_conversion_of_a_directory(tmp_path: Path) -> None:
    adalora().save_pretrained(tmp_path / "ada")
    peftcore.convert_directory_to_lora(tmp_path / "ada", tmp_path / "out")
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"


@checks("export_vllm", "model adapter_name folder")
@checks("check_vllm", "folder max_lora_rank")
def test_export_to_vllm(tmp_path: Path) -> None:
    from vllm_models import adapted

    model = adapted()
    model.add_adapter("b", lora("q_proj", r=20))
    assert peftcore.export_vllm(model, "default", tmp_path / "a") == 8
    rank = peftcore.export_vllm(model, "b", tmp_path / "b")
    assert rank == 32 and peftcore.check_vllm(tmp_path / "b", max_lora_rank=32) == []
    assert peftcore.check_vllm(tmp_path / "b") and not peftcore.check_vllm(tmp_path / "a")


@checks("export_gguf_lora", "source adapter_name file base dtype")
@checks("export_gguf_merged", "base source file adapter_name dtype")
def test_export_to_gguf(tmp_path: Path) -> None:
    from gguf_models import adapted, tiny, write_gguf

    base, model = write_gguf(tiny("llama"), tmp_path / "base.gguf"), adapted("llama")
    model.add_adapter("b", lora("q_proj", r=1))
    sizes = {}
    for number, (name, dtype) in enumerate((("default", "float32"), ("b", "float32"), ("default", "float16"))):
        file = peftcore.export_gguf_lora(model, name, tmp_path / f"{number}.gguf", dtype=dtype)
        sizes[number] = file.stat().st_size
    assert sizes[1] < sizes[0] > sizes[2]
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((ExportError, ConfigError), match="base"):
        peftcore.export_gguf_lora(tmp_path / "adapter", "default", tmp_path / "x.gguf")
    tiny("llama").save_pretrained(tmp_path / "model")
    assert peftcore.export_gguf_lora(
        tmp_path / "adapter", "default", tmp_path / "x.gguf", base=tmp_path / "model"
    ).is_file()
    merged = {
        (name, dtype): peftcore.export_gguf_merged(
            base, model, tmp_path / f"{name}{dtype}.gguf", adapter_name=name, dtype=dtype
        ).read_bytes()
        for name, dtype in (("default", "float32"), ("b", "float32"), ("default", "float16"))
    }
    assert len(set(merged.values())) == 3
    with pytest.raises((ExportError, OSError), match=r"none\.gguf"):
        peftcore.export_gguf_merged(tmp_path / "none.gguf", model, tmp_path / "y.gguf")


@checks("merge_streaming", "base_folder adapter_directory out_folder max_shard_bytes dtype storage double_quant")
@checks("merge_streaming", "progressbar")
def test_merge_streaming(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file
    from streamed_models import saved as base_model
    from streamed_models import trained as adapter

    base = base_model(tmp_path / "base")
    one, two = (adapter(base, lora("q_proj", r=r), tmp_path / f"adapter{r}") for r in (2, 3))

    def merged(name: str, directory: Path = one, source: Path = base, **options: Any) -> dict[str, Tensor]:
        folder = peftcore.merge_streaming(source, directory, tmp_path / name, **options)
        assert folder == tmp_path / name
        files = sorted(folder.glob("*.safetensors"))
        return {"files": torch.tensor(len(files)), **{k: t for file in files for k, t in load_file(file).items()}}

    capfd.readouterr()
    plain = merged("plain")
    assert not capfd.readouterr().err
    assert not same(merged("other adapter", two), plain)
    assert merged("shards", max_shard_bytes=10_000)["files"] > 1
    assert {t.dtype for key, t in merged("wide", dtype="float32").items() if key != "files"} == {torch.float32}
    assert same(merged("bar", progressbar=True), plain) and capfd.readouterr().err
    with pytest.raises((ExportError, ConfigError), match="storage"):
        merged("stored", storage="3 bit")
    with pytest.raises((ExportError, ConfigError), match="double_quant"):
        merged("doubled", double_quant=True)
    shutil.copytree(base, tmp_path / "empty")
    for file in (tmp_path / "empty").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(PeftError):
        merged("none", source=tmp_path / "empty")


@checks("_BaseAutoPeftModel.from_pretrained", "pretrained_model_name_or_path adapter_name is_trainable config revision")
@checks("_BaseAutoPeftModel.from_pretrained", "import_allowlist kwargs")
def test_auto_classes(tmp_path: Path) -> None:
    from routed_models import llama

    llama(torch.float32).save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(torch.float32), lora("q_proj", base_model_name_or_path=str(tmp_path / "base")))
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "adapter")
    load = peftcore.AutoPeftModelForCausalLM.from_pretrained
    config = dataclasses.replace(PeftConfig.from_pretrained(tmp_path / "adapter"), lora_alpha=99)
    loaded = load(tmp_path / "adapter", "b", is_trainable=True, config=config, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and trained(loaded) and loaded.peft_config["b"].lora_alpha == 99
    with pytest.warns(UserWarning, match="revision='v7' has no effect on the local directory"):
        load(tmp_path / "adapter", revision="v7")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    values |= {"task_type": None, "auto_mapping": {"parent_library": "json", "base_model_class": "JSONDecoder"}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="asks to import 'json'"):
        peftcore.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="json has no class 'JSONDecoder' with from_pretrained"):
        peftcore.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["json"])


# -- stores -----------------------------------------------------------------------------------------------------------


@checks("AdapterStore.__init__", "model max_loaded max_bytes base")
@checks("AdapterStore.register", "name source tags")
@checks("AdapterStore.register_directory", "folder")
@checks("AdapterStore.names", "tag")
@checks("AdapterStore.acquire", "name timeout")
@checks("AdapterStore.pin", "name")
@checks("AdapterStore.prefetch", "names")
@checks("AdapterStore.remove", "name")
@checks("AdapterStore.replace", "name source")
@checks("AdapterStore.route", "spec timeout")
@checks("AdapterStore.using", "names timeout")
@checks("AdapterStore.swap", "name source tags check")
def test_stores(saved: Path, tmp_path: Path) -> None:
    model: Any = Plain()
    store = peftcore.AdapterStore(model, max_loaded=1)
    store.register("a", saved, tags=["x"])
    store.register("b", saved / "second")
    assert store.names() == ["a", "b"] and store.names("x") == ["a"]
    with torch.no_grad():
        base = model(X)
        with store.route("a"):
            first = model(X)
        with store.route("b"):
            second = model(X)
        assert not any(torch.equal(p, q) for p, q in ((base, first), (first, second), (base, second)))
        with store.using("a") as names, pytest.raises(AdapterStoreError), store.using("b", timeout=0.01):
            assert list(names) == ["a"]
        lease = store.pin("a")
        for call in (store.acquire, store.route):
            with pytest.raises(AdapterStoreError), contextlib.ExitStack() as stack:
                result = call("b", timeout=0.01)
                if call == store.route:
                    stack.enter_context(result)
        lease.release()
        store.replace("a", saved / "second")
        with store.route("a"):
            assert torch.equal(model(X), second)
        checked: list[str] = []
        store.swap("a", saved, check=checked.append)
        store.swap("c", saved, tags=["x"])
        assert checked and store.names("x") == ["a", "c"]
        with store.route("a"):
            assert torch.equal(model(X), first)
        store.prefetch("b")[0].result()
        assert store.loaded() == ["b"]
        store.remove("b")
        assert store.names() == ["a", "c"]
    store.close()
    assert peftcore.AdapterStore(Plain()).register_directory(saved) == ["second"]
    for options in ({"max_bytes": 1}, {"base": "other"}):
        limited = peftcore.AdapterStore(Plain(), **options)
        limited.register("a", saved)
        with pytest.raises(PeftError):
            limited.acquire("a")
