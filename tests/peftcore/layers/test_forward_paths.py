"""An adapter layer takes a fast path wherever it gives the numbers of the general path, and nowhere else."""

import contextlib
import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from method_example import randomise
from replicas import replicas
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcore import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from peftcore.composition.stacked import stacked_outputs
from peftcore.kernels.low_rank import low_rank_linears
from peftcore.layers import adapter_layer, forward_paths

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.arange(2, 16).view(2, 7)


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)


def qwen() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).double()  # query, key and value have biases


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)).double()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    )


def adalora() -> AdaLoraConfig:
    return AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each fused operation has computed."""
    seen: list[int] = []

    def counted(operation: Any) -> Any:
        def call(x: Tensor, layers: Any, *others: Any) -> Any:
            seen.append(len(layers))
            return operation(x, layers, *others)

        return call

    for operation in (low_rank_linears, stacked_outputs):  # with gradients and without
        monkeypatch.setattr(forward_paths, operation.__name__, counted(operation))
    return seen


@contextlib.contextmanager
def general_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_paths, "has_no_hooks", lambda layer: False)
        patch.setattr(adapter_layer, "decoded", lambda layer, x: None)
        yield


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**({"input_ids": TOKENS, "labels": TOKENS} | inputs)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_as_in_general(model: Any, atol: float = 1e-10, **inputs: Any) -> None:
    loss, gradients = loss_and_gradients(model, **inputs)
    with general_path():
        expected_loss, expected = loss_and_gradients(model, **inputs)
    assert gradients.keys() == expected.keys() and gradients
    torch.testing.assert_close(loss, expected_loss, atol=atol, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


PLAIN_LORA = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "ranks": lora(rank_pattern={"q_proj": 2, "up_proj": 7}, alpha_pattern={"k_proj": 3}),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "adalora": adalora(),
}


@pytest.mark.parametrize("name", PLAIN_LORA)
def test_equals_the_general_path(name: str, calls: list[int]) -> None:
    model = get_peft_model(llama(), PLAIN_LORA[name])
    assert_as_in_general(model)
    assert calls == [3, 1, 2, 1] * 2  # q with k and v; o; gate with up; down


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_equals_the_general_path_with_biases(make: Any, calls: list[int]) -> None:
    model = get_peft_model(make(), lora()).eval()
    assert_as_in_general(model)
    assert calls


def test_dora_on_a_layer_with_bias_takes_the_general_path(calls: list[int]) -> None:
    model = get_peft_model(qwen(), lora(use_dora=True, target_modules=["q_proj"]))
    loss_and_gradients(model)
    assert not calls


@pytest.mark.parametrize("option", [{"lora_bias": True}, {"alora_invocation_tokens": [3]}])
def test_what_is_more_than_two_factors_takes_the_general_path(option: dict[str, Any], calls: list[int]) -> None:
    model = get_peft_model(qwen() if "lora_bias" in option else llama(), lora(target_modules=["q_proj"], **option))
    loss_and_gradients(model)
    assert not calls


def test_one_after_another(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora())
    model.add_adapter("second", lora(r=3))
    model.add_adapter("third", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    model.set_adapter(["default", "second", "third"])
    assert_as_in_general(model)
    assert calls == [1] * 14  # several adapters: each layer for itself


def test_the_base_below_an_input_scaling_adapter(calls: list[int]) -> None:
    model = get_peft_model(llama(), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))
    model.add_adapter("lora", lora(target_modules=["down_proj"]))
    model.set_adapter(["lora", "default"])  # IA3's `before` comes first, LoRA is next to the base
    assert_as_in_general(model)
    assert calls == [1, 1]


def test_merged_adapters_are_not_added_again(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora())
    expected = model(TOKENS).logits
    model.merge_adapter()
    calls.clear()
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-10, rtol=0)
    assert not calls


def test_a_merged_adapter_under_an_acting_one() -> None:
    model = get_peft_model(llama(), lora())
    model.add_adapter("second", lora(r=3))
    model.set_adapter(["default", "second"])
    expected = model(TOKENS).logits
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-10, rtol=0)


# -- gradients through what surrounds the layers --------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, calls: list[int]) -> None:
    model = get_peft_model(llama(), lora()).train()
    _, expected = loss_and_gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    _, gradients = loss_and_gradients(model)
    assert len(calls) > 8  # once more in the backward pass
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=0)
    assert not model._adapter_set.selection.cache.outputs


def test_gradient_checkpointing_brings_the_same_mask_back() -> None:
    model = get_peft_model(llama(), lora(lora_dropout=0.3)).train()
    torch.manual_seed(3)
    loss, expected = loss_and_gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again, gradients = loss_and_gradients(model)
    torch.testing.assert_close(again, loss, atol=1e-12, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=0)


def test_dropout_has_the_mean_of_no_dropout() -> None:
    layer = nn.Sequential(nn.Linear(64, 8, bias=False)).double()
    model = get_peft_model(layer, LoraConfig(r=4, target_modules=["0"], lora_dropout=0.4, init_lora_weights=False))
    x = torch.randn(1, 64, dtype=torch.float64)
    expected = model.eval()(x)
    torch.manual_seed(0)
    draws = model.train()(x.expand(20_000, 64))
    error = (draws.mean(0) - expected[0]).abs() / (draws.std(0) / 20_000**0.5)
    assert error.max() < 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, calls: list[int]) -> None:
    model = get_peft_model(llama(torch.float32), lora()).train()
    with torch.autocast("cpu", dtype):
        loss, gradients = loss_and_gradients(model)
    assert calls[:4] == [3, 1, 2, 1]
    with general_path(), torch.autocast("cpu", dtype):
        expected_loss, expected = loss_and_gradients(model)
    _, exact = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, atol=2e-2, rtol=0)
    for name, gradient in gradients.items():  # no further from float32 than the general path is
        assert gradient.dtype == torch.float32
        reference = exact[name].norm()
        assert (gradient - exact[name]).norm() < 2 * (expected[name] - exact[name]).norm() + 1e-2 * reference


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_bases(storage: str, calls: list[int], tmp_path: Any) -> None:
    llama(torch.float32).save_pretrained(tmp_path)
    settings = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if storage == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    base = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    model = get_peft_model(base, lora()).train()
    assert_as_in_general(model, atol=1e-5)
    assert calls[:4] == [3, 1, 2, 1]


@pytest.mark.slow
def test_torch_compile_sees_the_general_path(calls: list[int]) -> None:
    model = get_peft_model(llama(torch.float32), lora())
    expected = model(TOKENS).logits
    calls.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS).logits, expected, atol=1e-5, rtol=0)
    assert not calls


@pytest.mark.filterwarnings("ignore:.torch.jit.script.")  # PyTorch's own jacfwd
def test_transforms_see_the_general_path() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)).double(), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 5, dtype=torch.float64)
    rows = torch.func.vmap(model)(x)
    torch.testing.assert_close(rows, model(x), atol=1e-12, rtol=0)
    jacobian = torch.func.jacfwd(lambda row: model(row))(x[0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda row: model(row))(x[0]), atol=1e-12, rtol=0)


def test_hooks_on_the_base_layer_are_called(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora(target_modules=["o_proj"]))
    seen: list[Tensor] = []
    layer = model.model.layers[0].self_attn.o_proj.base_layer
    with layer.register_forward_hook(lambda _m, _x, y: seen.append(y)):
        expected = model(TOKENS).logits
    assert len(seen) == 1 and calls == [1]  # the other layer
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-12, rtol=0)


def test_hooks_of_all_modules_are_called_for_base_layers(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora(target_modules=["o_proj"]))
    base_layers = [layer.self_attn.o_proj.base_layer for layer in model.model.layers]
    seen: list[Any] = []
    with nn.modules.module.register_module_forward_hook(lambda module, _x, _y: seen.append(module)):
        hooked = loss_and_gradients(model)
    assert [module for module in seen if module in base_layers] == base_layers and not calls
    for found, expected in zip(hooked[1].values(), loss_and_gradients(model)[1].values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert calls == [1] * len(base_layers)


def test_a_base_that_trains_gets_its_gradient(calls: list[int]) -> None:
    model = get_peft_model(qwen(), lora(target_modules=["q_proj"]))
    for layer in model.model.layers:
        layer.self_attn.q_proj.base_layer.bias.requires_grad_(True)
    _, gradients = loss_and_gradients(model)
    assert gradients["model.layers.0.self_attn.q_proj.base_layer.bias"].any() and not calls


def test_a_trained_bias_is_added_to_what_the_fast_path_gives(calls: list[int]) -> None:
    model = get_peft_model(qwen(), lora(target_modules=["q_proj"], bias="lora_only"))
    randomise(model, 0.3)
    assert_as_in_general(model)
    calls.clear()
    _, gradients = loss_and_gradients(model)
    assert gradients["model.layers.0.self_attn.q_proj.trained_bias.default.bias"].any() and calls == [1, 1]


# -- what layers compute for one another ----------------------------------------------------------------------------


def test_nothing_is_left_waiting(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora()).train()
    model(TOKENS)
    with torch.no_grad():
        model(TOKENS)
    assert calls == [3, 1, 2, 1] * 4 and not model._adapter_set.selection.cache.outputs


def test_a_forward_that_breaks_off_leaves_nothing_for_the_next() -> None:
    model = get_peft_model(llama(), lora())
    expected = model(TOKENS).logits
    key = model.model.layers[0].self_attn.k_proj

    def refuse(*_: Any) -> None:
        raise RuntimeError("no")

    with key.register_forward_pre_hook(refuse), pytest.raises(RuntimeError):
        model(TOKENS)
    assert not model._adapter_set.selection.cache.outputs and not model._adapter_set.selection.cache.calls
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-12, rtol=0)


def test_the_query_of_cross_attention_shares_no_input(calls: list[int]) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config).double(), lora()).eval()
    cross = model.decoder.block[0].layer[1].EncDecAttention
    assert cross.q.siblings == [] and cross.k.siblings == [cross.v], "known from its name, before the first call"
    assert_as_in_general(model)


def test_cross_attention_with_any_name_learns_whose_input_it_shares(calls: list[int]) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config).double(), lora()).eval()
    other = model.decoder.block[0].layer[1].EncDecAttention
    other.q.siblings = [other.k, other.v]
    assert_as_in_general(model)
    model(input_ids=TOKENS, labels=TOKENS)
    assert other.q.siblings == [] and other.k.siblings == [other.v]
    assert_as_in_general(model)


def test_layers_that_read_changed_inputs_compute_for_themselves() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            q = self.q_proj(x)
            return q + self.k_proj(x.mul_(2)) + self.v_proj(x + 1)

    torch.manual_seed(0)
    model = get_peft_model(Changing().double(), lora(target_modules=["q_proj", "k_proj", "v_proj"]))
    x = torch.randn(3, 6, dtype=torch.float64)
    with general_path(), torch.no_grad():
        expected = model(x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)


def test_different_dropouts_are_not_shared(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj"], lora_dropout=0.2))
    model.add_adapter("other", lora(target_modules=["k_proj", "v_proj"]))
    model.set_adapter(["default", "other"])
    loss_and_gradients(model.train())
    assert calls == [1, 2] * 2


def test_replicas_of_data_parallel_compute_for_themselves(calls: list[int]) -> None:
    model = get_peft_model(llama(), lora())
    attention = model.model.layers[0].self_attn
    replica = replicas(attention.q_proj)[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(replica(x), attention.q_proj(x), atol=1e-12, rtol=0)
    calls.clear()
    with attention.k_proj.register_forward_hook(lambda *_: calls.append(-replica(x).dim())):
        model(TOKENS)
    assert calls == [3, 1, -3, 1, 2, 1, 3, 1, 2, 1]  # inside of a call too


def test_copies_and_pickles_share_among_themselves() -> None:
    model = get_peft_model(llama(), lora())
    expected = model(TOKENS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention = other.model.layers[0].self_attn
        assert attention.q_proj.siblings == [attention.k_proj, attention.v_proj]
        torch.testing.assert_close(other(TOKENS).logits, expected, atol=0, rtol=0)


def test_a_deleted_adapter_leaves_its_neighbours_right() -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("key", lora(target_modules=["q_proj", "k_proj"]))
    model.set_adapter("key")
    expected = model(TOKENS).logits
    model.delete_adapter("default")
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-12, rtol=0)


def test_a_seeded_run_has_the_same_losses_on_both_paths() -> None:
    def run() -> list[float]:
        model = get_peft_model(llama(torch.float32), lora(init_lora_weights=True)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    fast = run()
    torch.manual_seed(0)
    with general_path():
        general = run()
    assert fast[-1] < fast[0] - 0.4
    assert fast == pytest.approx(general, abs=1e-3)


def test_a_head_gets_the_last_tokens_of_the_rows_laid_together() -> None:
    base = llama()
    seen: list[bool] = []
    base.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    hooks = dict(base.lm_head._forward_pre_hooks)
    expected = base(TOKENS, logits_to_keep=1).logits
    model = get_peft_model(base, lora(init_lora_weights=True))
    assert torch.equal(model(TOKENS, logits_to_keep=1).logits, expected) and seen == [False, True]
    model.add_adapter("second", lora(target_modules=["lm_head"]))
    assert len(model.lm_head.base_layer._forward_pre_hooks) == 1
    assert dict(model.unload().lm_head._forward_pre_hooks) == hooks


@pytest.mark.parametrize(("training", "most"), [(False, 5), (True, 8)])
def test_a_forward_enters_few_modules(training: bool, most: int) -> None:
    """From the call of a LoRA layer to its matrix products a reader opens these modules, and no other."""
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"])).train(training)[0]
    x, entered = torch.randn(3, 8), set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and (module := frame.f_globals.get("__name__", "")).startswith("peftcore"):
            entered.add(module.removeprefix("peftcore."))

    with torch.set_grad_enabled(training):
        layer(x)
        sys.setprofile(note)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    fused = {
        "layers.forward_paths", "methods.lora.adapter", "bases.plain", "kernels.low_rank", "bases.compute_dtype",
    }  # fmt: skip
    assert entered == {"layers.adapter_layer", "layers.active", "bases.onednn"} | (
        fused if training else {"layers.decoding", "compiled.low_rank"}
    )
    assert len(entered) == most
