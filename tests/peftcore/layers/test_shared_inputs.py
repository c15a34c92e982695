"""A layer uses what another one computed for it only where it would compute the same itself."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.layers import forward_paths

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": PROJECTIONS, "init_lora_weights": False, **options})


class Attention(nn.Module):
    """Projections of one input; between them something happens that a test says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))
        self.between: Callable[[Tensor], Any] = lambda _: contextlib.nullcontext()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        q = self.q_proj(x)
        with self.between(x):
            k = self.k_proj(x)
        return q, k, self.v_proj(x)


def attention(dtype: torch.dtype = torch.float64) -> Any:
    model: Any = get_peft_model(Attention().to(dtype), lora(), "a")
    model.add_adapter("b", lora(r=3))
    return model.to(dtype)


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 6, dtype=torch.float64)


@contextlib.contextmanager
def after(work: Callable[[], Any]) -> Any:
    work()
    yield


def outputs(model: Any, x: Tensor, sharing: bool = True) -> tuple[Tensor, ...]:
    """Of a call that begins with adapter a; sharing: whether layers may compute for one another."""
    layers = [getattr(model, name) for name in PROJECTIONS]
    others = [layer.siblings for layer in layers]
    model.set_adapter("a")
    try:
        for layer in layers if not sharing else []:
            layer.siblings = []
        return model(x)
    finally:
        for layer, own in zip(layers, others, strict=True):
            layer.siblings = layer.siblings if sharing else own


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "disable_adapter": lambda m, x: m.disable_adapter(),
    "set_adapter": lambda m, x: after(lambda: m.set_adapter("b")),
    "route": lambda m, x: m.route("b"),
    "a mixture": lambda m, x: m.route({"a": 0.5, "b": 1.0}),
    "no_grad": lambda m, x: torch.no_grad(),
    "grad": lambda m, x: torch.enable_grad(),
    "inference_mode": lambda m, x: torch.inference_mode(),
    "autocast": lambda m, x: torch.autocast("cpu", torch.bfloat16),
    "an edit of the input": lambda m, x: after(lambda: x.add_(1)),
}


@pytest.mark.parametrize("outside", ["grad", "no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_inside_of_a_call(change: str, outside: str, inputs: Tensor) -> None:
    """Values, types and whether there is a gradient are those of layers that compute for themselves."""
    if (outside, change) == ("inference_mode", "grad"):
        pytest.skip("PyTorch refuses a tensor of inference mode there")
    contexts = {
        "grad": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    model, x = attention(torch.float32), inputs.float()
    model.between = lambda z: CHANGES[change](model, z)
    with contexts[outside]:
        expected = outputs(model, x, sharing=False)
        for _ in range(2):
            for one, other in zip(outputs(model, x), expected, strict=True):
                assert one.dtype == other.dtype and one.requires_grad == other.requires_grad
                torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def edit(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(-2)


def replace_b(model: Any) -> None:
    adapter = model.k_proj.adapters["a"]
    adapter.lora_B_weight = nn.Parameter(adapter.lora_B_weight.detach() * 3)


def delete_a(model: Any) -> None:
    with pytest.warns(UserWarning, match="'b' is the active one now"):
        model.delete_adapter("a")


def step(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True).step()


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda m: m.set_adapter("b"),
    "delete_adapter": delete_a,
    "an edit of an adapter": lambda m: edit(m.k_proj.adapters["a"].lora_A_weight),
    "an edit of the base": lambda m: edit(m.k_proj.base_layer.weight),
    "an edit that autograd does not count": lambda m: m.k_proj.base_layer.weight.data.mul_(-2),
    "another parameter": replace_b,
    "another scaling": lambda m: setattr(m.k_proj.adapters["a"], "scaling", 7.0),
    "a fused optimiser": step,
    "a merge": lambda m: m.merge_adapter(["a"]),
    "a hook": lambda m: m.k_proj.base_layer.register_forward_hook(lambda _m, _x, y: y * 2),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("change", BETWEEN)
def test_changes_between_two_layers_that_are_called_by_themselves(change: str, gradients: bool, inputs: Tensor) -> None:
    model, other = attention(), attention()
    model.set_requires_grad(["a", "b"])
    other.set_requires_grad(["a", "b"])
    with torch.set_grad_enabled(gradients):
        model(inputs)
        model.q_proj(inputs)
        BETWEEN[change](model)
        BETWEEN[change](other)
        torch.testing.assert_close(model.k_proj(inputs), other.k_proj(inputs), atol=1e-12, rtol=0)


def interrupt(model: Any, x: Tensor) -> None:
    """Press Ctrl-C during a call of the model; PyTorch then runs no hook at the end of the call."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with model.v_proj.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        model(x)


@pytest.mark.parametrize("fails", ["", "error", "Ctrl-C"])
def test_contexts_between_two_layers_that_are_called_by_themselves(fails: str, inputs: Tensor) -> None:
    """Also after a call of the model that ended with an error, or that was interrupted."""
    model = attention()
    base = nn.functional.linear(inputs, model.k_proj.base_layer.weight, model.k_proj.base_layer.bias)
    if fails == "error":
        with pytest.raises(RuntimeError):
            model(inputs[:, :5])
    if fails == "Ctrl-C":
        interrupt(model, inputs)
        model.q_proj(inputs)
        edit(model.k_proj.adapters["a"].lora_A_weight)
        torch.testing.assert_close(model.k_proj(inputs), model.k_proj(inputs.clone()), atol=1e-12, rtol=0)
        interrupt(model, inputs)
    model.q_proj(inputs)
    with model.disable_adapter():
        torch.testing.assert_close(model.k_proj(inputs), base)
    with torch.no_grad():
        model.q_proj(inputs)
    assert model.k_proj(inputs).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        model.q_proj(inputs.float())
    assert model.k_proj(inputs).dtype == torch.float64
    with torch.inference_mode():
        x = inputs.clone()
        model.q_proj(x)
        x.add_(1)
        torch.testing.assert_close(model.k_proj(x), model.k_proj(x.clone()), atol=1e-12, rtol=0)


def test_layers_share_inside_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value in one product, with gradients and without, on every call but in inference mode."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)), lora()).train()
    counts: list[int] = []
    for name in ("low_rank_linears", "stacked_outputs"):
        original = getattr(forward_paths, name)

        def counted(x: Tensor, layers: Any, *rest: Any, original: Any = original) -> Any:
            counts.append(len(layers))
            return original(x, layers, *rest)

        monkeypatch.setattr(forward_paths, name, counted)
    tokens = torch.arange(6).view(2, 3)
    for context in (torch.enable_grad(), torch.no_grad(), torch.enable_grad()):
        with context:
            model(tokens)
    assert counts == [3] * 3
    with torch.inference_mode():
        model(tokens)
    assert counts == [3] * 3 + [1] * 3


def test_an_interrupted_call_has_ended() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)), lora())
    selection, tokens = model._adapter_set.selection, torch.arange(6).view(2, 3)
    calls = []

    def stop(*_: Any) -> None:
        calls.append(len(selection.cache.calls))
        raise KeyboardInterrupt

    for _ in range(2):
        with model.lm_head.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            model(tokens)
    assert calls == [1, 1]
    assert model.base_model.model is model  # HF PEFT's view, and not transformers' model without the head
    model(tokens)
    assert not selection.cache.calls and not selection._running
