"""What HF peft 0.21.2 gets wrong, measured here, and right in peftcore on the same input.

Facts that need no oracle stand in the test file of what they are about.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from quantised_layers import quantised, with_one_nf4_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peftcore import (
    CheckpointError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.adalora import AdaLoraConfig
from peftcore.methods.ia3 import IA3Config
from peftcore.prompts.prefix_tuning import PrefixTuningConfig
from peftcore.registry import methods
from peftcore.train import AdapterTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls

Make = Callable[..., Any]
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["0"]}


def theirs(net: nn.Module, config: Any, name: str = "default") -> Any:
    """HF peft's model, its adapter away from its start."""
    model = peft.get_peft_model(copy.deepcopy(net), config, adapter_name=name).eval()
    randomise(model, 0.3)
    return model


def ours(net: nn.Module, config: Any) -> Any:
    """Our model, its adapter away from its start."""
    model = get_peft_model(copy.deepcopy(net), config).eval()
    randomise(model, 0.3)
    return model


def layer_of(model: Any, path: str = "0") -> Any:
    """HF peft's host at a path."""
    return model.base_model.model.get_submodule(path)


def linear(inputs: int = 6, outputs: int = 6, count: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(inputs, outputs) for _ in range(count)))


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    ends: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **ends, **options})).eval()


TOKENS = torch.tensor([[1, 5, 7, 29, 2], [3, 4, 11, 8, 6]])


# -- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["Conv1D", "Linear"])
def test_orientation_is_found_for_each_layer(first: str, tmp_path: Path) -> None:
    """PEFT keeps it in the one configuration that all layers share, so what is saved is that of the last layer."""
    torch.manual_seed(0)
    layers = [Conv1D(6, 6), nn.Linear(6, 6)]
    net, x = nn.Sequential(*(layers if first == "Conv1D" else layers[::-1])), torch.randn(3, 6)
    given = peft.LoraConfig(**{**LORA, "target_modules": ["0", "1"]})
    hf = theirs(net, given)
    assert given.fan_in_fan_out is (first == "Linear"), "the user's configuration is changed, by the order of layers"

    config = LoraConfig(**{**LORA, "target_modules": ["0", "1"]})
    model = ours(net, config)
    assert config == LoraConfig(**{**LORA, "target_modules": ["0", "1"]}) and not config.fan_in_fan_out
    for path, layer in (("0", net[0]), ("1", net[1])):  # type: ignore[index]
        delta = adapter_set(model).adapters("default")[path].delta_weight()
        weight = layer.weight + (delta.T if isinstance(layer, Conv1D) else delta)
        torch.testing.assert_close(_merged(model)[int(path)].weight, weight)
    hf.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)(x), hf(x), rtol=1e-5, atol=1e-5)


def _merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize(
    "options", [{"dilation": 2, "padding": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=["dilation", "mode"]
)
def test_convolutions_keep_dilation_and_padding_mode(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 4, 3, **options)), torch.randn(1, 4, 8, 8)
    hf = theirs(net, peft.LoraConfig(**LORA))
    if "dilation" in options:
        with pytest.raises(RuntimeError, match="must match the size"):
            hf(x)
    else:
        before = hf(x)
        hf.merge_adapter()
        assert (hf(x) - before).abs().max() > 0.1
    model = ours(net, LoraConfig(**LORA))
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_multihead_attention_keeps_its_parameters() -> None:
    """PEFT merges and unmerges around each forward, which puts another parameter into the optimiser's place."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    x = torch.randn(3, 1, 8)
    hf = theirs(Attends(), peft.LoraConfig(r=2, target_modules=["attention"]))
    before = layer_of(hf, "attention").base_layer.in_proj_weight
    hf(x)
    assert layer_of(hf, "attention").base_layer.in_proj_weight is not before

    model = ours(Attends(), LoraConfig(r=2, target_modules="all-linear"))
    kept = dict(model.named_parameters())
    model(x)
    assert all(parameter is kept[path] for path, parameter in model.named_parameters())
    assert "attention.out_proj" not in adapter_set(model).layers


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_merging_one_side_of_a_tied_pair(side: str) -> None:
    net = llama(tie_word_embeddings=True)
    for make, config, close in ((theirs, peft.LoraConfig, False), (ours, LoraConfig, True)):
        model = make(net, config(r=2, target_modules=[side]))
        before = model(TOKENS).logits
        merged = model.merge_and_unload()
        difference = (merged(TOKENS).logits - before).abs().max()
        assert difference < 1e-4 if close else difference > 1
        assert merged.config.tie_word_embeddings is not close


# -- LoRA and its variants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_lora_bias_is_merged_with_its_scale_into_quantised_layers(storage: str) -> None:
    """s is 3 here; test_merge.py asks the same of peftcore."""
    hf = peft.get_peft_model(quantised_net(storage), peft.LoraConfig(**LORA, lora_bias=True)).eval()
    randomise(hf, 0.3)
    layer = layer_of(hf)
    bias, own = layer.base_layer.bias.clone(), layer.lora_B["default"].bias.detach()
    hf.merge_adapter()
    torch.testing.assert_close(layer.base_layer.bias, bias + own)
    assert (layer.base_layer.bias - (bias + 3 * own)).abs().max() > 0.1


def quantised_net(storage: str) -> nn.Module:
    torch.manual_seed(0)
    net: Any = nn.Sequential(quantised(storage))
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = storage == "nf4", storage == "int8"
    return net


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_unloading_a_start_gives_the_original_weight_back(start: str) -> None:
    net = linear(8, 8)
    hf = theirs(net, peft.LoraConfig(**LORA, init_lora_weights=start))
    assert (hf.unload()[0].weight - net[0].weight).abs().max() > 0.1  # type: ignore[index]
    model = ours(net, LoraConfig(**LORA, init_lora_weights=start))
    assert torch.equal(model.unload()[0].weight, net[0].weight)  # type: ignore[index]


# -- IA3 and AdaLoRA -----------------------------------------------------------------------------------------------


def test_ia3_unmerges_where_its_vector_is_zero() -> None:
    net = linear()
    options: dict[str, Any] = {"target_modules": ["0"], "feedforward_modules": []}
    hf, model = theirs(net, peft.IA3Config(**options)), ours(net, IA3Config(**options))
    with torch.no_grad():
        layer_of(hf).ia3_l["default"][2] = 0
        adapter_set(model).adapters("default")["0"].ia3_l[2] = 0  # type: ignore[index]
    for merging in (hf, model):
        merging.merge_adapter()
        merging.unmerge_adapter()
    assert (layer_of(hf).base_layer.weight[2] == 0).all()
    assert torch.equal(model[0].base_layer.weight, net[0].weight)  # type: ignore[index]


ADALORA: dict[str, Any] = {"init_r": 6, "target_r": 2, "total_step": 5, "target_modules": ["0", "1"]}


def lambdas(model: Any) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "lora_E" in name]


def test_adalora_prunes_exactly_to_its_budget_on_ties() -> None:
    hf = peft.get_peft_model(linear(count=2), peft.AdaLoraConfig(**ADALORA))
    model = get_peft_model(linear(count=2), AdaLoraConfig(**ADALORA))
    for each, step in ((hf, hf.base_model.update_and_allocate), (model, model.on_optimizer_step)):
        with torch.no_grad():
            for parameter in lambdas(each):
                parameter.fill_(1.0)
        for parameter in each.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # every score equal
        for number in (1, 2, 3):
            step(number)
    assert sum(int((p != 0).sum()) for p in lambdas(hf)) == 0, "nothing is left"
    assert sum(int((p != 0).sum()) for p in lambdas(model)) == AdaLoraConfig(**ADALORA).budget(3, 2) > 0


def test_adalora_with_nothing_to_prune() -> None:
    options = {**ADALORA, "target_r": 6}
    hf = peft.get_peft_model(linear(count=2), peft.AdaLoraConfig(**options))
    model = get_peft_model(linear(count=2), AdaLoraConfig(**options))
    for each in (hf, model):
        for parameter in each.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with pytest.raises(RuntimeError, match="out of range"):
        for step in (1, 2):
            hf.base_model.update_and_allocate(step)
    for step in (1, 2, 3, 4, 5, 6):
        model.on_optimizer_step(step)
    assert all(bool(a.kept.all()) for a in adapter_set(model).adapters("default").values())


def test_adaloras_regulariser_is_squared() -> None:
    net = linear()
    hf = peft.get_peft_model(copy.deepcopy(net), peft.AdaLoraConfig(**{**ADALORA, "target_modules": ["0"]}))
    p, q = layer_of(hf).lora_B["default"], layer_of(hf).lora_A["default"]
    norms = torch.stack([(p.T @ p - torch.eye(6)).norm(), (q @ q.T - torch.eye(6)).norm()])
    hf.base_model.model.forward = lambda *_args, **_kwargs: type("Out", (), {"loss": torch.zeros(())})()
    torch.testing.assert_close(hf.base_model(torch.zeros(1)).loss, 0.5 * norms.mean())
    model = get_peft_model(net, AdaLoraConfig(**{**ADALORA, "target_modules": ["0"]}))
    a: Any = adapter_set(model).adapters("default")["0"]
    with torch.no_grad():
        a.lora_A_weight.copy_(q)
        a.lora_B_weight.copy_(p)
    torch.testing.assert_close(model.adapter_regularizer(), 0.5 * norms.square().mean())


def test_adaloras_rank_falls_in_training(tmp_path: Path) -> None:
    """With plain Trainer nothing calls PEFT's allocator."""
    options = {**ADALORA, "tfinal": 1, "total_step": 6, "target_modules": ["q_proj"]}
    rows: Any = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    left = {}
    for name, model, trainer in (
        ("peft", peft.get_peft_model(llama(), peft.AdaLoraConfig(**options)), Trainer),
        ("peftcore", get_peft_model(llama(), AdaLoraConfig(**options)), AdapterTrainer),
    ):
        args = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=6,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer(model=model, args=args, train_dataset=rows).train()
        left[name] = [len(p) for p in lambdas(model)]
    assert left["peft"] == [6, 6] and sum(left["peftcore"]) == 4


def test_adalora_merges_into_four_bits() -> None:
    """The contract test asks more of peftcore."""
    options = {**ADALORA, "target_modules": ["0"]}
    with pytest.raises(NotImplementedError):
        peft.get_peft_model(quantised_net("nf4"), peft.AdaLoraConfig(**options)).eval().merge_adapter()
    model = get_peft_model(quantised_net("nf4"), AdaLoraConfig(**options))
    model.merge_adapter()
    assert model[0].merged_names == ("default",)


# -- merge, unmerge, disable ---------------------------------------------------------------------------------------


def test_ten_rounds_of_merging_in_bfloat16() -> None:
    net = linear(64, 64).bfloat16()
    hf, model = theirs(net, peft.LoraConfig(**LORA)), ours(net, LoraConfig(**LORA))
    for _ in range(10):
        for each in (hf, model):
            each.merge_adapter()
            each.unmerge_adapter()
    weight = net[0].weight  # type: ignore[index]
    assert (layer_of(hf).base_layer.weight != weight).float().mean() > 0.5
    assert torch.equal(model[0].base_layer.weight, weight)


def two(make: Make, config: Any) -> Any:
    """Two adapters that act together."""
    model = make(linear(), config(**LORA))
    model.add_adapter("b", config(**LORA, init_lora_weights=False))
    (model.base_model if make is theirs else model).set_adapter(["default", "b"])
    return model.eval()


def test_merging_one_of_two_leaves_the_other_acting() -> None:
    x = torch.randn(3, 6)
    for make, config, same in ((theirs, peft.LoraConfig, False), (ours, LoraConfig, True)):
        model = two(make, config)
        both = model(x)
        model.merge_adapter(["default"])
        assert torch.allclose(model(x), both, atol=1e-5) is same


def test_a_merged_model_is_merged_again_after_it_was_disabled() -> None:
    x = torch.randn(3, 6)
    for make, config, merged in ((theirs, peft.LoraConfig, False), (ours, LoraConfig, True)):
        model = two(make, config)
        model.merge_adapter()
        before = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), linear()(x))
        host = layer_of(model) if make is theirs else model[0]
        assert host.merged is merged
        torch.testing.assert_close(model(x), before)


def test_safe_merge_writes_no_layer_when_one_is_broken() -> None:
    net = linear(count=2)
    options = {**LORA, "target_modules": ["0", "1"]}
    hf, model = theirs(net, peft.LoraConfig(**options)), ours(net, LoraConfig(**options))
    with torch.no_grad():
        layer_of(hf, "1").lora_B["default"].weight.fill_(float("nan"))
        adapter_set(model).adapters("default")["1"].lora_B_weight.fill_(float("nan"))  # type: ignore[operator]
    for each in (hf, model):
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)nan"):
            each.merge_adapter(safe_merge=True)
    assert not torch.equal(layer_of(hf).base_layer.weight, net[0].weight)  # type: ignore[index]
    assert torch.equal(model[0].base_layer.weight, net[0].weight)  # type: ignore[index]


# -- lifecycle -----------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.head, self.overhead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.overhead(self.q(x)))


def test_modules_to_save_are_named_by_whole_segments_and_the_configuration_is_left_alone() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"], "task_type": "SEQ_CLS"}
    given = peft.LoraConfig(**options)
    hf = peft.get_peft_model(Heads(), given)
    assert type(layer_of(hf, "overhead")).__name__ == "ModulesToSaveWrapper"
    assert given.modules_to_save == ["head", "classifier", "score"]
    config = LoraConfig(**options)
    model = get_peft_model(Heads(), config)
    assert type(model.overhead) is nn.Linear and set(adapter_set(model).saved) == {"head"}
    assert config == LoraConfig(**options)


@pytest.mark.parametrize("name", ["keys", "type", "forward"])
def test_an_adapter_may_be_called_like_an_attribute(name: str) -> None:
    """PEFT keeps adapters in `nn.ModuleDict`, which refuses names of its own methods."""
    with pytest.raises(KeyError, match="already exists"):
        peft.get_peft_model(linear(), peft.LoraConfig(**LORA), adapter_name=name)
    model = inject_adapter_in_model(LoraConfig(**LORA), linear(), name)
    assert list(adapter_set(model).configs) == [name]


@pytest.mark.parametrize("name", ["layers", "self_attn", "q_proj", "model", "lora_A", "o"])
def test_an_adapter_called_like_a_module_is_saved_whole(name: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"], init_lora_weights=False)
    model = get_peft_model(llama(), config, name)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / name / "adapter_model.safetensors"))
    paths = [f"model.layers.{number}.self_attn.q_proj.lora_{side}.weight" for number in (0, 1) for side in "AB"]
    assert keys == {f"base_model.model.{key}" for key in (*paths, "model.norm.weight")}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / name, name)
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_keys_that_do_not_fit_are_an_error_that_names_them(tmp_path: Path) -> None:
    """PEFT passes unexpected keys by without a word, and warns of missing ones only."""
    get_peft_model(linear(), LoraConfig(**LORA)).save_pretrained(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.7.lora_B.weight": torch.ones(6, 2)}, weights, {"format": "pt"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(linear(), tmp_path)
    assert not [warning for warning in seen if "lora" in str(warning.message)]
    with pytest.raises(CheckpointError, match=r"unexpected base_model\.model\.7\.lora_B\.weight"):
        PeftModel.from_pretrained(linear(), tmp_path)


def test_a_failed_injection_or_load_leaves_the_model(tmp_path: Path) -> None:
    """test_bad_input.py asks the same of peftcore, bit for bit."""
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with pytest.raises(ValueError, match="ReLU"):
        peft.get_peft_model(net, peft.LoraConfig(**{**LORA, "target_modules": ["0", "1"]}))
    assert isinstance(net[0], BaseTunerLayer)
    peft.get_peft_model(linear(), peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    wider = linear(9, 9)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(wider, tmp_path)
    assert isinstance(wider[0], BaseTunerLayer)  # type: ignore[index]
    wider = linear(9, 9)
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(wider, tmp_path)
    assert type(wider[0]) is nn.Linear  # type: ignore[index]


# -- training ------------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Shapes of what is cast to float32 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.float32:
            self.shapes.append(tuple(out.shape))
        return out


def test_activations_are_not_cast_to_the_adapters_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.bases.compute_dtype._is_slow", lambda dtype: False)
    x, casts = torch.randn(50, 6, dtype=torch.bfloat16), {}
    for make, config in ((theirs, peft.LoraConfig), (ours, LoraConfig)):
        model = make(linear().bfloat16(), config(**LORA))
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        with Casts() as seen:
            assert model(x).dtype == torch.bfloat16
        casts[config] = seen.shapes
    assert (50, 6) in casts[peft.LoraConfig] and (50, 6) not in casts[LoraConfig]


TRAINED = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and not example.whole_model
}


def gradients(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    """Of the adapter's parameters, with the model in training mode."""
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(5)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", TRAINED)
def test_checkpointed_layers_give_the_same_gradients(method: str) -> None:
    plain, saving = (ours(llama(), TRAINED[method].make(target_modules=["q_proj", "down_proj"])) for _ in range(2))
    expected, got = gradients(plain, False), gradients(saving, True)
    assert all(g is not None for g in expected.values()) and expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.parametrize("method", ["CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PROMPT_TUNING"])
def test_prompts_other_than_a_prefix_go_with_checkpointing(method: str) -> None:
    config: Any = methods()[method].config
    if method == "CPT":
        given = config(cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4])
    else:
        given = config(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tasks = {"task_ids": torch.tensor([0, 0])} if method == "MULTITASK_PROMPT_TUNING" else {}
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(), given)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(TOKENS, labels=TOKENS, **tasks).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any(gradient.abs().max() > 0 for gradient in results[0].values())
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


@pytest.mark.parametrize("reentrant", [None, True])
def test_preparing_for_few_bits_lets_gradients_through_checkpointed_layers(reentrant: bool | None) -> None:
    """Without reentry by default; and with it too, because the embeddings' output requires grad."""
    model = with_one_nf4_layer(llama().bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": True} if reentrant else None
        )
    assert all(p.dtype in (torch.float32, torch.uint8) and not p.requires_grad for p in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    adapted(TOKENS, labels=TOKENS).loss.backward()
    checkpointing: list[Any] = [m for m in adapted.modules() if getattr(m, "gradient_checkpointing", False)]
    assert {m._gradient_checkpointing_func.keywords["use_reentrant"] for m in checkpointing} == {bool(reentrant)}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)


# -- prompts -------------------------------------------------------------------------------------------------------


def test_generate_reads_the_prefix() -> None:
    """With transformers 5.24 PEFT's `generate` gives what the base gives; test_learner.py asks more of peftcore."""
    config: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    given = {"input_ids": TOKENS[:1], "attention_mask": torch.ones_like(TOKENS[:1])}
    base = llama().generate(**given, **greedy)
    for make, kind, reads in ((theirs, peft.PrefixTuningConfig, False), (ours, PrefixTuningConfig, True)):
        model = make(llama(), kind(**config))
        with torch.no_grad():
            ids = TOKENS[:1]
            for _ in range(6):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        generated = model.generate(**given, **greedy)
        assert not torch.equal(ids, base)
        assert torch.equal(generated, ids) is reads and torch.equal(generated, base) is not reads
