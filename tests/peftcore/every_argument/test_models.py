"""Arguments of functions that make models, choose their adapters and call them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from argument_checks import checks
from argument_nets import Plain, X, lora, net, same, tensors_of, trained
from torch import nn
from xlora_models import mixed, tokens, trained_loras

import peftcore
from peftcore import (
    ConfigError,
    MergeError,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcore.errors import AdapterNameError, AdapterStoreError, HotswapError, PeftError
from peftcore.hf_peft import functional, helpers, preprocess
from peftcore.hf_peft.classes import BaseTunerLayer
from peftcore.hf_peft.utils import hotswap
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.layer_selection import LayerSelection


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters: its own and `second`."""
    folder = tmp_path_factory.mktemp("saved")
    net("default", "second").save_pretrained(folder)
    return folder


# -- making a model ----------------------------------------------------------------------------------------------------


@checks("get_peft_model", "model peft_config adapter_name mixed revision")
def test_get_peft_model() -> None:
    plain = Plain()
    model = get_peft_model(plain, lora("1"), "other", mixed=True, revision="v2")
    assert model is plain and list(model.peft_config) == ["other"] == model.active_adapters
    assert list(adapter_set(model).layers) == ["1"] and model.peft_config["other"].revision == "v2"
    assert isinstance(model, peftcore.PeftMixedModel) and not isinstance(net(), peftcore.PeftMixedModel)
    with pytest.raises(ConfigError, match="mixed must be True or False"):
        get_peft_model(Plain(), lora(), mixed="yes")  # type: ignore[arg-type]


@checks(
    "create_arrow_model", "base_model task_specific_adapter_paths arrow_config general_adapter_paths adapter_kwargs"
)
def test_a_model_with_a_router(saved: Path) -> None:
    folders = [str(saved), str(saved / "second")]

    def routed(task: list[str], general: list[str] | None = None, **options: Any) -> Any:
        base = Plain(torch.bfloat16)
        arrow = peftcore.ArrowConfig(top_k=1, use_gks=general is not None)
        model = peftcore.create_arrow_model(base, task, arrow, general, **options)
        assert model is base and arrow.task_adapter_names == [f"task_{number}" for number in range(len(task))]
        return model

    assert list(routed(folders).peft_config) == ["task_0", "task_1", "arrow_router"]
    assert list(routed(folders[:1], folders[1:]).peft_config) == ["task_0", "gks_0", "arrow_router"]
    first, second = (tensors_of(routed([folder]), "task_0") for folder in folders)
    assert not same(first, second) and {t.dtype for t in first.values()} == {torch.float32}
    narrow = routed(folders[:1], autocast_adapter_dtype=False)
    assert {t.dtype for t in tensors_of(narrow, "task_0").values()} == {torch.bfloat16}


@checks("find_kappa_target_modules", "model top_p max_dim_size_to_analyze moe_param_suffixes show_progress")
def test_targets_by_condition_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    model = Plain()
    model.raw = nn.Parameter(torch.randn(2, 3, 3))
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = peftcore.find_kappa_target_modules(model, 1.0, show_progress=False)
    assert sorted(found["target_modules"] or ()) == sorted(linear) and found["target_parameters"] is None
    assert not capfd.readouterr().err.strip()
    one = peftcore.find_kappa_target_modules(model, 0.01, moe_param_suffixes=("raw",))
    assert one == {"target_modules": (found["target_modules"] or [])[:1], "target_parameters": ["raw"]}
    assert capfd.readouterr().err
    none = peftcore.find_kappa_target_modules(model, 1.0, max_dim_size_to_analyze=1, show_progress=False)
    assert none == {"target_modules": [], "target_parameters": None}


@checks("bloom_model_postprocess_past_key_value", "past_key_values")
def test_prefixes_in_the_layout_of_an_old_cache() -> None:
    import peft

    prefixes = torch.randn(4, 2, 3, 5, 6).split(2)
    ours, theirs = (one.bloom_model_postprocess_past_key_value(prefixes) for one in (peftcore, peft))
    assert all(torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))


@checks("get_peft_model", "autocast_adapter_dtype low_cpu_mem_usage")
@checks("PeftModel.add_adapter", "adapter_name peft_config autocast_adapter_dtype low_cpu_mem_usage")
@checks("inject_adapter_in_model", "peft_config model adapter_name low_cpu_mem_usage state_dict")
@checks("TunerModel.__init__", "model config adapter_name low_cpu_mem_usage state_dict peft_config")
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
    with pytest.warns(RuntimeWarning, match="adapts the 1 layers that state_dict names"):
        assert inject_adapter_in_model(lora("0"), plain, "c", state_dict=state) is plain
    assert list(adapter_set(plain).layers) == ["1"] and list(adapter_set(plain).configs) == ["c"]
    with pytest.raises(ConfigError, match="add_adapter takes a name and a configuration"):
        net().add_adapter("b", "c")
    view = peftcore.LoraModel(plain := Plain(), lora("1"), "d")
    assert view.model is plain and list(view.peft_config) == ["d"] and view.targeted_module_names == ["1"]
    with pytest.warns(RuntimeWarning, match="adapts the 1 layers that state_dict names"):
        view = peftcore.LoraModel(Plain(), peft_config=lora("0"), low_cpu_mem_usage=True, state_dict=state)
    assert view.targeted_module_names == ["1"]
    assert {p.is_meta for n, p in view.named_parameters() if "lora_" in n} == {True}


@checks("TunerModel.inject_adapter", "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict")
def test_a_configuration_that_was_set_is_injected() -> None:
    for autocast, low in ((True, False), (False, True)):
        model = get_peft_model(Plain(torch.bfloat16), lora(), autocast_adapter_dtype=False)
        model.base_model.peft_config["b"] = lora("1")
        model.base_model.inject_adapter(model, "b", autocast_adapter_dtype=autocast, low_cpu_mem_usage=low)
        tensors = tensors_of(model, "b").values()
        assert {t.dtype for t in tensors} == {torch.float32 if autocast else torch.bfloat16}
        assert {t.is_meta for t in tensors} == {low}
    model = get_peft_model(Plain(), lora())
    model.base_model.peft_config["b"] = lora("0")
    state = {key.replace("0.", "1."): tensor for key, tensor in tensors_of(net()).items()}
    with pytest.warns(RuntimeWarning, match="adapts the 1 layers that state_dict names"):
        model.base_model.inject_adapter(model, "b", state_dict=state)
    assert list(adapter_set(model).adapters("b")) == ["1"]


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


# -- activation --------------------------------------------------------------------------------------------------------

SETTERS: dict[str, Callable[..., None]] = {
    "model": lambda model, *args, **options: model.set_adapter(*args, **options),
    "view": lambda model, *args, **options: model.base_model.set_adapter(*args, **options),
    "function": functional.set_adapter,
}


@checks("TunerModel.get_model_config", "model")
def test_the_configuration_of_a_model() -> None:
    plain = Plain()
    assert peftcore.LoraModel.get_model_config(plain) == {"model_type": "custom"}
    plain.config = {"layers": 2}  # type: ignore[assignment]
    assert peftcore.LoraModel.get_model_config(plain) == {"layers": 2}


@checks("TunerModel.named_parameters", "prefix recurse remove_duplicate")
@checks("TunerModel.named_buffers", "prefix recurse remove_duplicate")
@checks("TunerModel.named_modules", "memo prefix remove_duplicate")
def test_names_of_the_view_take_the_arguments_of_a_modules() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plain.append(plain[1])
    plain.register_buffer("own", torch.ones(1))
    view = get_peft_model(plain, lora("0")).base_model
    for names_of in (view.named_parameters, view.named_buffers, view.named_modules):
        names = [name for name, _ in names_of()]
        assert [name for name, _ in names_of(prefix="x")] == [f"x.{name}" if name else "x" for name in names]
        both = [name for name, _ in names_of(remove_duplicate=False)]
        assert set(names) < set(both) and any(name.startswith("model.2") for name in set(both) - set(names))
    assert [name for name, _ in view.named_parameters(recurse=False)] == []
    assert [name for name, _ in view.named_buffers(recurse=False)] == ["model.own"]
    assert "model.1" not in dict(view.named_modules(memo={plain[1]}))


@checks("PeftModel.load_state_dict", "state_dict strict assign")
def test_load_state_dict() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["0"], "modules_to_save": ["1"], "init_lora_weights": False}
    theirs = peft.get_peft_model(Plain(), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.rand_like(parameter))
    first = get_peft_model(Plain(), lora(**options))
    assert first.load_state_dict(theirs.state_dict()) == ([], [])
    for state in (theirs.state_dict(), first.state_dict()):
        model = get_peft_model(Plain(), lora(**options))
        assert model.load_state_dict(state) == ([], [])
        torch.testing.assert_close(model(X), theirs(X))
        given = {name: tensor for name, tensor in state.items() if "lora_B" not in name}
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(given)
        assert model.load_state_dict(given, strict=False) == (["0.lora_B.default.weight"], [])
        model.load_state_dict(state, assign=True)
        assert model[0].lora_A["default"].weight.data_ptr() in {tensor.data_ptr() for tensor in state.values()}


@checks("PeftModel.set_adapter", "adapter_name inference_mode")
@checks("TunerModel.set_adapter", "adapter_name inference_mode")
@checks("set_adapter", "model adapter_name inference_mode layer_cls")
@pytest.mark.parametrize("setter", SETTERS.values(), ids=list(SETTERS))
def test_set_adapter(setter: Callable[..., None]) -> None:
    model = net("a", "b")
    setter(model, "b")
    assert model.active_adapters == ["b"] and trained(model) == {f"0.lora_{f}.b.weight" for f in "AB"}
    setter(model, ["b", "a"], inference_mode=True)
    assert model.active_adapters == ["b", "a"] and not trained(model)
    if setter is functional.set_adapter:
        with pytest.raises(ConfigError, match="layer_cls must be BaseTunerLayer"):
            setter(model, "a", layer_cls=nn.Linear)
        setter(model, "a", layer_cls=BaseTunerLayer)


@checks("PeftModel.set_requires_grad", "adapter_names requires_grad")
@checks("TunerModel.set_requires_grad", "adapter_names requires_grad")
@checks("set_requires_grad", "model adapter_names requires_grad")
@pytest.mark.parametrize(
    "setter",
    [
        PeftModel.set_requires_grad,
        lambda model, *names, **options: model.base_model.set_requires_grad(*names, **options),
        functional.set_requires_grad,
    ],
)
def test_set_requires_grad(setter: Any) -> None:
    model = net("a", "b")
    setter(model, "b")
    assert len(trained(model)) == 4
    setter(model, ["a"], requires_grad=False)
    assert trained(model) == {f"0.lora_{f}.b.weight" for f in "AB"}


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


@checks("XLoraModel.set_topk_lora", "value")
@checks("XLoraModel.set_global_scaling_weight", "weight")
@checks("XLoraModel.set_scaling_pass_value", "value")
@pytest.mark.filterwarnings("ignore")
def test_weights_of_an_xlora(tmp_path: Path) -> None:
    view = mixed(trained_loras(tmp_path, "llama")).base_model
    before = view(tokens()).logits
    for setter, value in (
        (view.set_topk_lora, 1),
        (view.set_global_scaling_weight, 0.5),
        (view.set_scaling_pass_value, 3),
    ):
        setter(value)
        after = view(tokens()).logits
        assert not torch.equal(before, after)
        before = after


@checks("VBLoRAModel.get_nb_savable_parameters", "adapter")
def test_numbers_of_one_of_two_vbloras() -> None:
    small, large = (
        peftcore.VBLoRAConfig(target_modules=["0"], r=r, num_vectors=300, vector_length=4, save_only_topk_weights=True)
        for r in (2, 4)
    )
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 12)), small)
    model.add_adapter("large", large)
    (few, _), (many, _) = (model.get_nb_savable_parameters(name) for name in ("default", "large"))
    assert 0 < few < many


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


@checks("_has_own_signature", "model method")
def test_signatures() -> None:
    helpers.update_signature(net(), "forward")
    with pytest.raises(ValueError, match="method must be"):
        helpers.update_signature(net(), "backward")
    with pytest.raises(AdapterNameError, match="has no adapters"):
        helpers.update_signature(Plain())


@checks("PeftLayerAttributes.get_delta_weight", "adapter")
@checks("PeftLayerAttributes.reset_lora_parameters", "adapter_name init_lora_weights")
def test_reset_lora_parameters() -> None:
    model = net("a", "b")
    before = {name: tensors_of(model, name) for name in "ab"}
    model[0].reset_lora_parameters("b", "orthogonal")
    assert same(tensors_of(model, "a"), before["a"]) and not same(tensors_of(model, "b"), before["b"])
    with pytest.raises(ConfigError, match="init_lora_weights"):
        model[0].reset_lora_parameters("b", "unknown")
    model.add_adapter("c", peftcore.LoHaConfig(target_modules=["0"]))
    with pytest.raises(PeftError, match="'c' is no LoRA"):
        model[0].reset_lora_parameters("c", True)


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


@checks("SwitchingMethods.set_adapter", "adapter_names inference_mode")
@checks("SwitchingMethods.set_requires_grad", "adapter_names requires_grad")
@checks("SwitchingMethods.enable_adapters", "enabled")
@checks("MergingMethods.merge", "safe_merge adapter_names")
@checks("MergingMethods.delete_adapter", "adapter_name")
@checks("MergingMethods.use_selection", "selection")
def test_switching_by_a_layer() -> None:
    model = net("a", "b")
    layer = model[0]
    layer.set_adapter(["b", "a"], inference_mode=True)
    assert model.active_adapters == ["b", "a"] and not trained(model)
    layer.set_adapter("b")
    assert model.active_adapters == ["b"] and trained(model) == {f"0.lora_{f}.b.weight" for f in "AB"}
    layer.set_requires_grad(["a", "b"], requires_grad=False)
    assert not trained(model)
    layer.set_requires_grad("b")
    assert trained(model) == {f"0.lora_{f}.b.weight" for f in "AB"}
    adapted = model(X)
    layer.enable_adapters(enabled=False)
    assert torch.equal(model(X), Plain()(X)) and not torch.equal(model(X), adapted)
    layer.enable_adapters(enabled=True)
    assert torch.equal(model(X), adapted)
    shared = layer.selection
    layer.use_selection(own := LayerSelection(shared))
    own.switched_off = True
    assert torch.equal(model(X), Plain()(X))
    layer.use_selection(shared)
    assert torch.equal(model(X), adapted)
    layer.adapters["b"].lora_A_weight.data.fill_(float("nan"))
    with pytest.raises(MergeError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    layer.merge()
    assert layer.merged_adapters == ["b"] and layer.base_layer.weight.isnan().any()
    layer.unmerge()
    layer.merge(adapter_names=["a"])
    assert layer.merged_adapters == ["a"]
    layer.delete_adapter("b")
    assert list(layer.adapters) == ["a"]


@checks("PeftModel.get_submodule", "target")
def test_paths_of_submodules() -> None:
    model = net("a")
    assert model.get_submodule("0") is model.get_submodule("base_model.model.0") is model[0]


@checks("refresh_adapters", "model")
@checks("get_layer_status", "model")
@checks("get_model_status", "model")
@checks("get_base_model_state_dict", "model")
@checks("check_mergeable", "model adapter_names")
def test_functions_of_a_model_alone(tmp_path: Path) -> None:
    model = net("a", "b")
    with torch.no_grad():
        before = model(X)
        model[0].adapters["a"].lora_A_weight.data.mul_(2)
        peftcore.refresh_adapters(model)
        assert not torch.equal(model(X), before)
    assert len(peftcore.get_layer_status(model)) == 1
    assert peftcore.get_model_status(model).available_adapters == ["a", "b"]
    assert same(peftcore.get_base_model_state_dict(model), dict(Plain().state_dict()))
    model.add_adapter("c", lora(alora_invocation_tokens=[1]))
    peftcore.check_mergeable(model, ["a", "b"])
    with pytest.raises(MergeError):
        peftcore.check_mergeable(model, ["a", "c"])
    for function in (peftcore.refresh_adapters, peftcore.get_layer_status):
        with pytest.raises(PeftError, match="get_peft_model first"):
            function(Plain())


@checks("PeftModel.enable_peft_hotswap", "target_rank check_compiled")
@checks("prepare_model_for_compiled_hotswap", "model target_rank config check_compiled")
@checks("hotswap_adapter", "model model_name_or_path adapter_name torch_device kwargs")
@checks("hotswap_adapter_from_state_dict", "model state_dict adapter_name config parameter_prefix")
@checks("check_hotswap_configs_compatible", "config0 config1")
def test_hotswap(saved: Path, tmp_path: Path) -> None:
    for prepare in (hotswap.prepare_model_for_compiled_hotswap, PeftModel.enable_peft_hotswap):
        model = net()
        prepare(model, target_rank=7)
        assert set(model.adapter_ranks().values()) == {7}
        with pytest.raises(HotswapError, match="check_compiled must be"):
            prepare(net(), check_compiled="no")  # type: ignore[arg-type]
    hotswap.prepare_model_for_compiled_hotswap(net(), target_rank=7, config=(further := lora()))
    assert further.r == 7
    model = net("default", "other")
    for parameter in model.parameters():
        parameter.data.mul_(2)
    state = tensors_of(model)
    for name in ("default", "other"):
        before = tensors_of(model, name)
        hotswap.hotswap_adapter(model, saved, name)
        assert not same(tensors_of(model, name), before)
        assert [t.tolist() for t in tensors_of(model, name).values()] == [
            t.tolist() for t in peftcore.load_peft_weights(saved).values()
        ]
    default = tensors_of(model, "other")
    hotswap.hotswap_adapter(model, saved, "other", subfolder="second")
    assert not same(tensors_of(model, "other"), default)
    with pytest.raises(ConfigError, match="torch_device='cuda:99' is not a device of this machine"):
        hotswap.hotswap_adapter(model, saved, "other", "cuda:99")
    hotswap.hotswap_adapter_from_state_dict(model, state, "other", lora())
    assert same(tensors_of(model, "other"), state) and not same(tensors_of(model), state)
    scaling = model[0].adapters["other"].scaling
    hotswap.hotswap_adapter_from_state_dict(model, state, "other", lora(lora_alpha=99))
    assert model[0].adapters["other"].scaling != scaling
    with pytest.raises(HotswapError, match="parameter_prefix must be 'lora_'"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "other", lora(), "ia3_")
    for pair in ((lora(use_rslora=True), lora()), (lora(), lora(use_dora=True))):
        with pytest.raises(HotswapError, match="so one cannot take the place"):
            hotswap.check_hotswap_configs_compatible(*pair)


@checks("preprocess_corda", "model lora_config run_model hooked_model")
@checks("preprocess_loraga", "model lora_config train_step cache_file")
@checks("estimate_gradients", "model lora_config train_step")
def test_starts_from_data_before_the_adapter(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["1"]}
    corda = peftcore.LoraConfig(init_lora_weights="corda", corda_config={"corda_method": "kpm"}, **options)
    plain, hooked = Plain(), Plain()
    preprocess.preprocess_corda(plain, corda, lambda: plain(X))
    preprocess.preprocess_corda(other := Plain(), corda, lambda: hooked(10 * X), hooked)
    assert not hasattr(plain[0], "eigens") and plain[1].eigens.S_WC.shape == (2,)
    assert not torch.equal(plain[1].eigens.V_WC, other[1].eigens.V_WC)
    loraga = peftcore.LoraConfig(init_lora_weights="lora_ga", lora_ga_config={"scale": "unit"}, **options)
    file = tmp_path / "gradients"
    preprocess.preprocess_loraga(plain, loraga, lambda: plain(X).square().sum().backward(), file)
    preprocess.preprocess_loraga(other, loraga, lambda: pytest.fail("the file is there"), file)
    assert torch.equal(plain[1]._peft_loraga_grad, other[1]._peft_loraga_grad)
    config = peftcore.LoraConfig(r=2, target_modules=["0"])
    preprocess.estimate_gradients(other, config, lambda: (3 * other(X)).square().sum().backward())
    assert hasattr(other[0], "_peft_loraga_grad") and not hasattr(plain[0], "_peft_loraga_grad")
    with pytest.raises(ConfigError, match="no lora_ga_config"):
        preprocess.preprocess_loraga(plain, lora(), lambda: None)


# -- stores ------------------------------------------------------------------------------------------------------------


@checks("AdapterStore.__init__", "model max_loaded max_bytes base autocast_adapter_dtype")
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
    sizes = []
    for has_float32 in (True, False):
        narrow = peftcore.AdapterStore(Plain().bfloat16(), autocast_adapter_dtype=has_float32)
        narrow.register("a", saved)
        narrow.acquire("a")
        sizes.append(narrow.statistics()["bytes"])
    assert sizes[0] == 2 * sizes[1]
