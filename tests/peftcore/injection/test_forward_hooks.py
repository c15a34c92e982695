"""Hooks on the whole model: installed with the first adapter, removed with the last."""

import inspect
from typing import Any

import pytest
import routed_models
import torch
from routed_models import lora, mixture
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, PromptTuningConfig, get_peft_model
from peftcore.errors import RoutingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.forward_paths import contiguous_input
from peftcore.methods.poly import PolyConfig

TOKENS = torch.arange(6).view(2, 3)


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_unloading_removes_every_hook() -> None:
    model = llama()
    before = hooks(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert hooks(model) > before and contiguous_input in model.lm_head._forward_pre_hooks.values()
    assert hooks(model.unload()) == before


def test_a_call_ends_also_with_an_error() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    cache = adapter_set(model).selection.cache
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(len(cache.calls)))
    model(TOKENS)
    assert seen == [1] and not cache.calls

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(TOKENS)
    assert not cache.calls and not cache.outputs


def test_adapter_arguments_reach_the_method_and_not_the_model() -> None:
    """Poly mixes its skills by `task_ids`, which Llama's forward does not know."""
    config = PolyConfig(target_modules=["q_proj"], r=2, n_tasks=3, n_skills=2, init_weights=False)
    model = get_peft_model(llama(), config).eval()  # in training, Poly draws its mixture at random
    with torch.no_grad():
        for number in (0, 1):
            one = model(TOKENS, task_ids=torch.tensor([number, number])).logits
            mixed = model(TOKENS, task_ids=torch.tensor([number, 2])).logits
            torch.testing.assert_close(mixed[0], one[0])


def test_calling_forward_directly_is_a_call_of_the_model_where_adapters_need_it() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad(), model.route(["a", "b"]):
        torch.testing.assert_close(model.forward(TOKENS).logits, model(TOKENS).logits)


def test_a_prompt_hears_of_the_text_that_generate_continues_and_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    learner, heard = model.prompt_encoder["default"], []
    monkeypatch.setattr(learner, "begin_generation", lambda arguments: heard.append(sorted(arguments)))
    monkeypatch.setattr(learner, "end_generation", lambda: heard.append([]))
    model.generate(TOKENS, max_new_tokens=1, attention_mask=torch.ones_like(TOKENS), stopping_criteria=None)
    assert heard == [["attention_mask", "input_ids", "max_new_tokens"], []]
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(input_ids=TOKENS, nonsense=1)
    assert heard[2:] == [["input_ids", "nonsense"], []]
    with model.disable_adapter():
        model.generate(TOKENS, max_new_tokens=1)
    assert len(heard) == 4


def test_forward_called_directly_equals_a_call_of_the_model() -> None:
    """PyTorch runs no hooks for a direct call of `forward`, and adapters learn of a call by hooks."""
    tokens = routed_models.TOKENS
    model = mixture(routed_models.llama())
    model.add_adapter("invoked", lora(alora_invocation_tokens=[20]))
    model.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.double().eval()
    names = ["a", "b", None, "c", {"a": 0.5, "b": 1.0}, "prompt"]
    assert torch.equal(model.forward(tokens, adapter_names=names).logits, model(tokens, adapter_names=names).logits)
    assert not torch.equal(model(tokens, adapter_names="b").logits, model(tokens).logits)
    for name in ("b", "invoked", "prompt"):
        with model.route(name):
            assert torch.equal(model.forward(tokens).logits, model(tokens).logits)
        model.set_adapter(name)
        assert torch.equal(model.forward(input_ids=tokens).logits, model(tokens).logits)
    model.set_adapter("invoked")
    offsets = {"alora_offsets": [2] * 6}
    assert torch.equal(model.forward(tokens, **offsets).logits, model(tokens, **offsets).logits)
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 6 rows"):
        model.forward(tokens, adapter_names=["a", "b"])
    assert inspect.signature(model.forward) == inspect.signature(routed_models.llama().forward)


class OfManyTensors(nn.Module):
    """A model that is called with a dictionary, or with a list, of tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.layer(batch["x"] if isinstance(batch, dict) else batch[0])


@pytest.mark.parametrize("pack", [lambda x: {"x": x}, lambda x: [x]], ids=["dictionary", "list"])
def test_a_route_of_one_composition_needs_no_rows(pack: Any) -> None:
    model = get_peft_model(OfManyTensors(), LoraConfig(target_modules=["layer"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(3, 4)
    with model.disable_adapter():
        assert torch.equal(model(pack(x)), OfManyTensors()(pack(x)))
    with model.route("b"):
        routed = model(pack(x))
    model.set_adapter("b")
    assert torch.equal(routed, model(pack(x)))
    with model.route(["a", "b", "b"]), pytest.raises(RoutingError, match="without a tensor among its arguments"):
        model(pack(x))


def test_a_failed_start_of_a_generation_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    model.add_adapter("poly", PolyConfig(target_modules=["q_proj"], r=2, n_tasks=3, n_skills=2))
    learner, ended = model.prompt_encoder["default"], []

    def fail(_arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(learner, "begin_generation", fail)
    monkeypatch.setattr(learner, "end_generation", lambda: ended.append(True))
    with model.route("default") as route:
        with pytest.raises(ZeroDivisionError):
            model.generate(TOKENS, max_new_tokens=1, task_ids=torch.tensor([1, 2]))
        assert not route.repeats and not adapter_set(model).generate_arguments and ended == [True]


class PositionalOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, /, scale: float = 1.0) -> torch.Tensor:
        return scale * self.layer(x)


def test_positional_only_arguments_stay_positional() -> None:
    model = get_peft_model(PositionalOnly(), LoraConfig(target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(3, 4)
    expected = model(x, 2.0)
    for names in ("default", ["default"] * 3):
        with model.route(names):
            assert torch.equal(model(x, 2.0), expected) and torch.equal(model(x, scale=2.0), expected)
    with model.route([None, "default", None]):
        torch.testing.assert_close(model(x, 2.0)[1], expected[1])
