"""Arguments of functions around training and starts from data."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from argument_checks import checks
from argument_nets import Plain, X, adalora, lora, net, same, tensors_of
from torch import Tensor, nn

import peftcore
from peftcore import (
    ConfigError,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peftcore.hf_peft import functional, optimizers

pytestmark = pytest.mark.filterwarnings("ignore:.init_lora_weights. is:UserWarning")  # EVA or CorDA by defaults


@checks("PeftModel.on_optimizer_step", "step optimizer")
@checks("TunerModel.update_and_allocate", "global_step")
@checks("AdaLoraModel.update_and_allocate", "global_step")
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
    ranks = {}
    for end in (1, 3):  # AdaLoRA masks ranks in the steps between its first and its last
        model = adalora()
        for step in range(1, end + 1):
            model(X).square().sum().backward()
            model.base_model.update_and_allocate(step)
        ranks[end] = sum(model.adapter_ranks().values())
    assert ranks[3] < ranks[1]
    model = net("a")
    model.add_adapter("b", lora("1", r=5))
    assert model.adapter_ranks("b") == {"1": 5} != model.adapter_ranks()


@checks("AdaLoraModel.resize_modules_by_rank_pattern", "rank_pattern adapter_name")
@checks("AdaLoraModel.resize_state_dict_by_rank_pattern", "rank_pattern state_dict adapter_name")
def test_ranks_by_masks() -> None:
    model = adalora()
    path, r = "0", model.peft_config["default"].init_r
    keys = {f"base_model.model.{path}.lora_{letter}.{name}" for letter in "AEB" for name in ("default", "b")}
    for kept in (r, 1):
        masks = {f"{path}.lora_E": [True] * kept + [False] * (r - kept)}
        state = {key: torch.ones(2, r) if "lora_B" in key else torch.ones(r, 2) for key in keys}
        shrunken = model.resize_state_dict_by_rank_pattern(masks, dict(state), "default")
        assert shrunken[f"base_model.model.{path}.lora_B.default"].shape == (2, kept)
        assert shrunken[f"base_model.model.{path}.lora_B.b"].shape == (2, r)
        model.resize_modules_by_rank_pattern(masks, "default")
        assert model.adapter_ranks()[path] == kept
    with pytest.raises(peftcore.AdapterNameError):
        model.resize_modules_by_rank_pattern({}, "b")


@checks("PeftModel.supports_lora_conversion", "adapter_name")
@checks("PeftModel.get_prompt_embedding_to_save", "adapter_name")
@checks("PeftModel.prepare_model_for_gradient_checkpointing", "model")
@checks("PeftModel.get_prompt", "batch_size task_ids max_cache_len")
@checks("prepare_model_for_kbit_training", "model use_gradient_checkpointing gradient_checkpointing_kwargs")
def test_transformers_models() -> None:
    from quantised_layers import with_one_nf4_layer
    from routed_models import llama

    model = get_peft_model(llama(torch.bfloat16), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "p")
    model.add_adapter("l", lora("q_proj"))
    assert model.get_prompt_embedding_to_save("p").shape[0] == 3
    assert [model.get_prompt(rows).shape[:2] for rows in (1, 2)] == [(1, 3), (2, 3)]
    with pytest.raises(ConfigError, match="takes no task_ids"):
        model.get_prompt(2, task_ids=torch.arange(2))
    options: dict[str, Any] = {"num_virtual_tokens": 3, "num_tasks": 2, "task_type": "CAUSAL_LM"}
    multitask = get_peft_model(llama(), MultitaskPromptTuningConfig(**options))
    first, second = multitask.get_prompt(2, task_ids=torch.arange(2))
    assert not torch.equal(first, second)
    with pytest.raises(ConfigError, match="max_cache_len must be None"):
        model.get_prompt(2, max_cache_len=5)
    with pytest.raises(ConfigError, match="'l' is LORA, which has no prompt embeddings"):
        model.get_prompt_embedding_to_save("l")
    assert model.supports_lora_conversion("l") and not model.supports_lora_conversion("p")
    other = llama().requires_grad_(False)
    assert not other.get_input_embeddings()(torch.tensor([1])).requires_grad
    assert model.prepare_model_for_gradient_checkpointing(other) is other
    assert other.get_input_embeddings()(torch.tensor([1])).requires_grad
    for checkpoints in (False, True):
        prepared: Any = with_one_nf4_layer(llama(torch.bfloat16))
        prepared = peftcore.prepare_model_for_kbit_training(prepared, checkpoints)
        assert prepared.is_activation_checkpointing is checkpoints and prepared.dtype == torch.float32
    prepared = with_one_nf4_layer(llama())
    prepared = peftcore.prepare_model_for_kbit_training(prepared, True, {"use_reentrant": True})
    blocks = [module for module in prepared.modules() if getattr(module, "gradient_checkpointing", False)]
    assert {block._gradient_checkpointing_func.keywords["use_reentrant"] for block in blocks} == {True}


@checks("prepare_model_for_kbit_training", "auto_clear_cache")
def test_memory_is_returned_after_the_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: calls.append(True))
    peftcore.prepare_model_for_kbit_training(Plain(), False, auto_clear_cache=False)
    assert not calls
    peftcore.prepare_model_for_kbit_training(Plain(), False, auto_clear_cache=True)
    assert calls == [True]


@checks("set_dropout_masks", "masks")
def test_dropout_masks() -> None:
    model = net(lora_dropout=0.5).train()

    def output() -> Tensor:
        torch.manual_seed(0)
        return model(X)

    fast = output()
    try:
        peftcore.set_dropout_masks("pytorch")
        assert not torch.equal(output(), fast)
    finally:
        peftcore.set_dropout_masks("fast")
    assert torch.equal(output(), fast)


@checks("set_start_subtraction", "place")
def test_start_subtraction() -> None:
    def keeps_base() -> bool:
        model: Any = peftcore.get_peft_model(Plain(), lora("0", init_lora_weights="pissa"))
        return torch.equal(model[0].base_layer.weight, Plain()[0].weight)

    assert keeps_base()
    try:
        peftcore.set_start_subtraction("base")
        assert not keeps_base()
    finally:
        peftcore.set_start_subtraction("adapter")


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
@checks("create_riemannian_optimizer", "model optimizer_cls lr reg kwargs")
def test_optimizers() -> None:
    model = net("a")
    for other in ({"r": 4}, {"lora_alpha": 9}):
        with pytest.warns(UserWarning, match=f"{next(iter(other))}=.*the scaling of each layer is used"):
            optimizers.create_lorafa_optimizer(model, **{"r": 2, "lora_alpha": 8, "lr": 0.1, **other})
    with pytest.raises(ConfigError, match="use_rslora"):
        optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1, use_rslora=True)
    fa = optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1, weight_decay=0.5)
    assert {(g["lr"], g["weight_decay"]) for g in fa.param_groups} == {(0.1, 0.5)}
    model = net("a")
    plus = optimizers.create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, loraplus_weight_decay=0.2, momentum=0.3
    )
    groups = [group for group in plus.param_groups if group["params"]]
    assert isinstance(plus, torch.optim.SGD) and {round(g["lr"], 3) for g in groups} == {0.1, 0.4}
    assert {(g["momentum"], g["weight_decay"]) for g in groups} == {(0.3, 0.2)}
    riemannian = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.5, momentum=0.3)
    assert riemannian.defaults["lr"] == 0.5 and riemannian.defaults["momentum"] == 0.3
    norms = []
    for reg in (1.0, 3.0):
        model = net("a")
        optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.0, reg=reg)
        model(X).square().mean().backward()
        optimizer.step()
        norms.append(sum(p.grad.norm() for p in model.parameters() if p.grad is not None))
    assert norms[0] > norms[1] > 0


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
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config={}))
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
        for option, value in ONLY_ONE_VALUE.items():
            with pytest.raises(ConfigError, match=option):
                started(data, **{option: value})
        starts = peftcore.get_eva_state_dict(Plain(), data, lora("0", r=2), show_progress_bar=False)
        assert same(started(None, eva_state_dict=starts), plain)


ONLY_ONE_VALUE = {
    "prepare_model_inputs_fn": {},
    "prepare_layer_inputs_fn": {},
    "gather_distributed_inputs": False,
}


@checks("get_eva_state_dict", "model dataloader peft_config forward_fn adapter_name show_progress_bar")
@checks("get_eva_state_dict", "prepare_model_inputs_fn prepare_layer_inputs_fn gather_distributed_inputs")
def test_starts_that_are_returned(capfd: pytest.CaptureFixture[str]) -> None:
    data = [{"x": torch.randn(40, 6, generator=torch.Generator().manual_seed(3))}]
    squares = [{"x": one["x"] ** 2} for one in data]
    model = get_peft_model(Plain(), lora("0", r=2), "a")
    model.add_adapter("b", lora("0", r=3))
    wide = lora("0", r=4)

    def starts(rows: Any = data, **options: Any) -> dict[str, Tensor]:
        return peftcore.get_eva_state_dict(
            options.pop("model", model), rows, **{"adapter_name": "a", "show_progress_bar": False, **options}
        )

    (plain,) = starts().values()
    assert len(plain) == 2 and not capfd.readouterr().err.strip()
    assert [
        len(a) for options in ({"adapter_name": "b"}, {"peft_config": wide}) for a in starts(**options).values()
    ] == [3, 4]
    assert list(starts(model=Plain(), peft_config=wide)) == ["0"] != list(starts())
    assert not same(starts(squares), starts())
    assert same(starts([{"y": data[0]["x"]}], forward_fn=lambda model, one: model(one["y"])), starts())
    starts(show_progress_bar=True)
    assert capfd.readouterr().err
    for option, value in ONLY_ONE_VALUE.items():
        with pytest.raises(ConfigError, match=option):
            starts(**{option: value})


@checks("initialize_from_data", "model_path")
@checks("calibrate_rounding", "model batches model_path damping activation_order forward progress")
def test_calibration_of_a_quantised_base(capfd: pytest.CaptureFixture[str]) -> None:
    from quantised_layers import quantised

    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator)
    data = [{"input": torch.randn(99, 64, generator=generator) @ mixing} for _ in range(2)]
    torch.manual_seed(0)
    layer = quantised("nf4")
    dense = get_peft_model(nn.Sequential(layer), lora("0"))[0].base.read().clone()
    original = {"0.weight": dense + 0.02 * torch.randn(dense.shape, generator=generator)}

    def base() -> Any:
        return nn.Sequential(copy.deepcopy(layer))

    def started(start: str, source: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=start), "b")
        peftcore.initialize_from_data(model, data, "b", progress=False, model_path=source)
        return tensors_of(model, "b")

    def rounded(**options: Any) -> Tensor:
        model = base()
        arguments = {"batches": data, "model_path": original, "progress": False, **options}
        peftcore.calibrate_rounding(model, **arguments)
        return model[0].weight.data

    assert not same(started("qera", original), started("qera", {"0.weight": original["0.weight"] * 1.1}))
    with pytest.raises(ConfigError, match="model_path has no effect with init_lora_weights='eva'"):
        started("eva", original)
    plain = rounded()
    assert not torch.equal(plain, layer.weight.data)
    for options in (
        {"batches": data[:1]},
        {"model_path": {"0.weight": original["0.weight"] * 1.1}},
        {"damping": 1.0},
        {"activation_order": False},
        {"forward": lambda model, batch: model(batch["input"].square())},
    ):
        assert not torch.equal(rounded(**options), plain)
    capfd.readouterr()
    rounded(progress=True)
    assert "rounding" in capfd.readouterr().err


@checks("replace_lora_weights_loftq", "peft_model model_path adapter_name callback")
def test_loftq_on_a_quantised_base(tmp_path: Path) -> None:
    from quantised_layers import quantised
    from safetensors.torch import save_file

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
    save_file(original, tmp_path / "model.safetensors")
    peftcore.replace_lora_weights_loftq(model, tmp_path, "b")
    assert same(tensors_of(model, "b"), first)
