"""EVA, CorDA, LoRA-GA and LoftQ on a quantised base: what their papers say, at layer level and on a tiny Llama."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peftcore import CheckpointError, ConfigError, LoraConfig, PeftModel, get_peft_model
from peftcore.init import initialize_from_data, replace_lora_weights_loftq
from peftcore.methods.lora.variants.eva import PrincipalComponents
from peftcore.injection.adapter_set import adapter_set

SMOLLM2 = Path(__file__).parents[3] / "artifacts" / "base"


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def batches(count: int = 6) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    rows = [torch.randint(0, 40, (4, 9)) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)} for ids in rows]


def lora(start: str, **options: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": start}
    return get_peft_model(llama(), LoraConfig(**{**config, **options}))


TOKENS = torch.tensor([[1, 5, 7, 30, 2, 9]])


def test_principal_components_are_those_of_all_rows_at_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8) @ torch.diag(torch.arange(8, 0, -1.0)) + 3
    found = PrincipalComponents(8)
    for part in x.split(40):
        found.add(part, tau=0.99)
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.values, s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((found.components @ v.T).abs(), torch.eye(8), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.explained().sum(), torch.tensor(1.0))
    assert found.rows == 200


def test_eva_spends_the_ranks_where_they_explain_most() -> None:
    model = lora("eva")
    base = model(TOKENS).logits
    before = {path: a.r for path, a in adapter_set(model).adapters("default").items()}
    initialize_from_data(model, batches(), progress=False)
    after = dict(adapter_set(model).adapters("default"))
    assert sum(a.r for a in after.values()) == sum(before.values())
    assert {a.r for a in after.values()} != {4} and max(a.r for a in after.values()) <= 8
    torch.testing.assert_close(model(TOKENS).logits, base)  # B is zero
    for adapter in after.values():
        gram = adapter.lora_A @ adapter.lora_A.T
        torch.testing.assert_close(gram, torch.eye(adapter.r), rtol=1e-4, atol=1e-4)
        assert adapter.scaling == pytest.approx(2.0)  # α follows r
    assert model.active_adapters == ["default"] and all(a.lora_A.requires_grad for a in after.values())


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("use_rslora, scaling", [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_eva_keeps_the_scale_of_layers_whose_rank_changes(use_rslora: bool, scaling: float, adjust: bool) -> None:
    model = lora("eva", use_rslora=use_rslora, eva_config={"adjust_scaling_factors": adjust})
    initialize_from_data(model, batches(), progress=False)
    layers = adapter_set(model).adapters("default").values()
    assert {a.r for a in layers} != {4}
    for a in layers:
        assert a.scaling == pytest.approx(scaling if adjust else 8 / (a.r**0.5 if use_rslora else a.r))


def test_eva_leaves_masked_rows_out(tmp_path: Any) -> None:
    data = batches()
    for batch in data:
        batch["labels"][:, :-1] = -100
        batch["attention_mask"][:] = 1
    model = lora("eva", eva_config={"rho": 1.0})
    initialize_from_data(model, data, progress=False)
    assert {a.r for a in adapter_set(model).adapters("default").values()} == {4}
    other = lora("eva", eva_config={"rho": 1.0, "use_label_mask": False})
    initialize_from_data(other, data, progress=False)
    ours, theirs = (next(iter(adapter_set(m).adapters("default").values())).lora_A for m in (model, other))
    assert not torch.allclose(ours.abs(), theirs.abs(), atol=1e-2)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "start, options",
    [
        ("corda", {}),
        ("corda", {"corda_config": {"corda_method": "kpm"}}),
        ("lora_ga", {}),
        ("lora_ga", {"lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"}}),
        ("lora_ga", {"lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"}}),
        ("lora_ga", {"lora_ga_config": {"direction": "random", "scale": "unit"}}),
    ],
)
def test_what_is_taken_out_of_the_base_changes_no_output(start: str, options: dict[str, Any], tmp_path: Any) -> None:
    base = llama()(TOKENS).logits
    model = lora(start, **options)
    initialize_from_data(model, batches(), progress=False)
    torch.testing.assert_close(model(TOKENS).logits, base, rtol=1e-4, atol=1e-5)
    layers = adapter_set(model).adapters("default")
    assert all(a.lora_A.abs().max() > 0 and a.lora_B.abs().max() > 0 for a in layers.values())
    with torch.no_grad():
        for a in layers.values():
            a.lora_B.mul_(10)
    adapted = model(TOKENS).logits
    assert not torch.allclose(adapted, base, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)  # plain LoRA of twice the rank: no data is needed to read it
    assert loaded.peft_config["default"].r == 8
    torch.testing.assert_close(loaded(TOKENS).logits, adapted, rtol=1e-4, atol=1e-5)
    again = lora(start, **options)
    again.load_adapter_weights(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, adapted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.unload()(TOKENS).logits, base, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_decomposes_the_weight_as_the_data_sees_it(method: str) -> None:
    model = lora("corda", target_modules=["q_proj"], corda_config={"corda_method": method})
    path, adapter = next(iter(adapter_set(model).adapters("default").items()))
    seen: list[torch.Tensor] = []
    handle = adapter.base.layer.register_forward_hook(lambda _m, x, _y: seen.append(x[0].detach()))
    initialize_from_data(model, batches(), progress=False)
    handle.remove()
    x = torch.cat([rows.reshape(-1, 16) for rows in seen])
    part = adapter.scaling * adapter.lora_B @ adapter.lora_A
    weight = adapter.base.read()
    share = (x @ part.T).norm() / (x @ weight.T).norm()
    assert share > 0.7 if method == "ipm" else share < 0.3, path


def test_lora_ga_first_step_follows_the_gradient_of_the_weight() -> None:
    model = lora("lora_ga", target_modules=["q_proj"], r=8, lora_ga_config={"direction": "ArB2r", "scale": "unit"})
    data = batches(2)
    initialize_from_data(model, data, progress=False)
    plain = llama()
    for batch in data:
        plain(**batch).loss.backward()
    path, adapter = next(iter(adapter_set(model).adapters("default").items()))
    gradient = plain.get_submodule(path).weight.grad
    u, _, vh = torch.linalg.svd(gradient)
    torch.testing.assert_close((adapter.lora_A @ vh[:8].T).abs(), torch.eye(8), rtol=1e-2, atol=1e-2)
    directions = nn.functional.normalize(adapter.lora_B, dim=0)
    torch.testing.assert_close((directions.T @ u[:, 8:16]).abs(), torch.eye(8), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit"])
def test_lora_ga_does_not_depend_on_how_often_a_batch_is_seen(scale: str) -> None:
    products = []
    for count in (1, 8, 64):
        torch.manual_seed(0)
        model = lora("lora_ga", target_modules=["q_proj"], lora_ga_config={"scale": scale})
        initialize_from_data(model, batches(1) * count, progress=False)
        products.append([a.lora_B @ a.lora_A for a in adapter_set(model).adapters("default").values()])
    for other in products[1:]:
        for ours, theirs in zip(products[0], other, strict=True):
            assert (theirs - ours).norm() < 1e-3 * ours.norm()


def test_quantised_bases_can_be_looked_at_too() -> None:
    model = llama()
    for block in model.model.layers:
        made = bnb.nn.Linear4bit(16, 16, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        made.load_state_dict(block.self_attn.q_proj.state_dict())
        block.self_attn.q_proj = made.to("cpu")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="lora_ga")).train()
    base = model(TOKENS).logits
    initialize_from_data(model, batches(2), progress=False)
    torch.testing.assert_close(model(TOKENS).logits, base, rtol=1e-2, atol=1e-2)


def test_loftq_takes_up_what_quantising_lost(tmp_path: Any) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 64, bias=False))
    made: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(original[0].state_dict())
    model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(r=16, lora_alpha=8, target_modules=["0"]))
    weight, quantised = original[0].weight.detach(), model[0].base.read().clone()
    replace_lora_weights_loftq(model, {"0.weight": weight})
    adapter = adapter_set(model).adapters("default")["0"]
    merged = quantised + adapter.delta_weight()
    u, s, vh = torch.linalg.svd(weight - quantised)
    best = u[:, :16] * s[:16] @ vh[:16]
    torch.testing.assert_close(adapter.delta_weight(), best, rtol=1e-3, atol=1e-4)
    assert (merged - weight).norm() < (quantised - weight).norm()
    kept = adapter.lora_A.detach().clone()
    replace_lora_weights_loftq(model, {"0.weight": weight * 2}, callback=lambda _model, _path: False)
    assert torch.equal(adapter.lora_A, kept)
    with pytest.raises(CheckpointError, match=r"no 0\.weight"):
        replace_lora_weights_loftq(model, {})
    with pytest.raises(CheckpointError, match="no safetensors"):
        replace_lora_weights_loftq(model, tmp_path)


def test_loftq_with_dora_starts_at_the_same_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    made: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": weight})
    options = {"r": 16, "lora_alpha": 8, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(use_dora=True, **options))
    replace_lora_weights_loftq(model, {"0.weight": weight})
    adapter = adapter_set(model).adapters("default")["0"]
    quantised = model[0].base.read()
    torch.testing.assert_close(adapter.merged_weight(quantised), quantised + adapter.delta_weight())


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="SmolLM2 is not fetched; run `make run` first")
@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_loftq_on_real_layers_is_nearer_to_the_original_than_quantising_alone(storage: str) -> None:
    original = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    for block in (original.model.layers[0], original.model.layers[-1]):
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj):
            made: Any = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type=storage)
            made.load_state_dict({"weight": layer.weight})
            model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(r=16, target_modules=["0"]))
            replace_lora_weights_loftq(model, {"0.weight": layer.weight})
            adapter = adapter_set(model).adapters("default")["0"]
            quantised = model[0].base.read()
            lost = (layer.weight - quantised).norm()
            left = (layer.weight - adapter.merged_weight(quantised)).norm()
            assert left < 0.97 * lost


def test_what_does_not_fit_changes_nothing() -> None:
    model = lora("eva")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="no batch"):
        initialize_from_data(model, [], progress=False)
    with pytest.raises(ConfigError, match="give batches with labels"):
        initialize_from_data(lora("lora_ga"), [{"input_ids": TOKENS}], progress=False)
    with pytest.raises(ConfigError, match="needs no data for its initialisation"):
        initialize_from_data(lora("gaussian"), batches(), progress=False)
    with pytest.raises(ConfigError, match="unknown"):
        initialize_from_data(lora("corda", corda_config={"corda_methd": "ipm"}), batches(), progress=False)
    with pytest.raises(ConfigError, match="at most 8"):
        initialize_from_data(lora("lora_ga", r=9, target_modules=["q_proj"]), batches(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
