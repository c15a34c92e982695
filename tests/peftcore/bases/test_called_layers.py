"""Layers whose weight a module reads: no adapter goes there, so that merging changes no output."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.bases import calls_layer, kernel_reads
from peftcore.errors import TargetError


class Mixer(nn.Module):
    """Uses its children in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.cast, self.read, self.conv, self.hidden, self.elsewhere, self.started = (
            nn.Linear(4, 4) for _ in range(7)
        )
        self.inside = nn.Sequential(self.elsewhere, self.started)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.started.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) if x.dtype == self.called.weight.dtype else F.linear(x, self.called.weight)
        x = self.cast.forward(x.to(self.cast.weight.dtype))
        x = F.linear(x, self.read.weight, None if self.read.bias is None else self.read.bias)
        x = self.inside(x.to(self.elsewhere.weight.dtype))

        def inner() -> Tensor:
            return self.hidden(x @ self.hidden.weight)

        return self.convolved(inner())

    def convolved(self, x: Tensor) -> Tensor:
        return F.linear(x, self.conv.weight.squeeze(1))


def test_a_layer_is_read_only_where_no_method_uses_anything_but_its_weight() -> None:
    children = [name for name, _ in Mixer().named_children()]
    assert [name for name in children if not calls_layer(Mixer(), name)] == ["read", "conv"]


def convolve(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias)


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x)


def kernel_function(func: Any) -> nn.Module:
    """Wrap a function as the package kernels does."""

    class Func(nn.Module):
        def forward(self, *args: Any) -> Tensor:
            return func(*args)

    return Func()


def weigh(x: Any) -> Tensor:
    return x.weight


convolve_by_kernel, apply_by_kernel = kernel_function(convolve), kernel_function(apply)


def convolve_padded(layer: nn.Linear, x: Tensor) -> Tensor:
    return convolve_by_kernel(layer, F.pad(x, (0, layer.in_features - x.shape[-1])))


class Passing(nn.Module):
    """Passes its children to functions, as the mixers of transformers 5.25 do."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.read_by_kernel, self.read_deeper, self.called, self.called_by_kernel, self.inner = (
            nn.Linear(4, 4) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = convolve(self.read, x)
        x = convolve_by_kernel(self.read_by_kernel, x)
        x = convolve_padded(self.read_deeper, x)
        x = apply_by_kernel(self.called_by_kernel, apply(self.called, x))
        return weigh(self.inner(x)) + self.inner.weight


def test_a_layer_that_a_called_function_reads_is_read() -> None:
    children = [name for name, _ in Passing().named_children()]
    assert [name for name in children if not calls_layer(Passing(), name)] == ["read", "read_by_kernel", "read_deeper"]


def call_query(attention: Any, x: Tensor) -> Tensor:
    return attention.to_q(x)


class Delegating(nn.Module):
    """Lets another object call its child, as diffusers' attention does, and reads the weight outside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return call_query(self, x)

    def fuse_projections(self) -> Tensor:
        return torch.cat([self.to_q.weight, self.to_q.weight])


def test_methods_outside_of_the_forward_do_not_say_that_a_layer_is_read() -> None:
    assert calls_layer(Delegating(), "to_q")


def test_a_quantised_model_calls_the_time_step_of_its_mixers() -> None:
    mixer: Any = tiny("falcon_mamba").get_submodule("backbone.layers.0.mixer")
    assert not calls_layer(mixer, "dt_proj")
    mixer.config._is_quantized = True
    assert calls_layer(mixer, "dt_proj") and not calls_layer(mixer, "conv1d")


# the last three have subclasses of nn.Linear whose output is not that of a linear layer
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "llama4_text", "phimoe", "deepseek_v4"])
def test_all_linear_merges_into_what_it_computed(model_type: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny(model_type, "cpu"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.eval()
    tokens = torch.arange(10, 18)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["dt_proj", "conv1d"])
def test_a_layer_that_is_read_is_refused_by_name(name: str) -> None:
    with pytest.raises(TargetError, match=rf"mixer\.{name} belongs to MambaMixer, whose forward reads the weight"):
        get_peft_model(tiny("mamba"), LoraConfig(target_modules=[name]))


def test_a_saved_adapter_of_such_a_layer_loads_with_a_warning(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=2, target_modules=["dt_proj"])
    with monkeypatch.context() as patch:
        patch.setattr("peftcore.injection.targets.calls_layer", lambda parent, name: True)
        get_peft_model(tiny("mamba", "cpu"), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the adapter there has no effect before it is merged"):
        loaded = PeftModel.from_pretrained(tiny("mamba", "cpu"), tmp_path)
    assert loaded.peft_config["default"].target_modules == {"dt_proj"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_fused_kernel_reads_projections_of_mamba_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer: Any = tiny("mamba", "cpu").get_submodule("backbone.layers.0.mixer")
    for name in ("in_proj", "x_proj", "out_proj"):
        weight: Any = SimpleNamespace(device=torch.device(device))
        monkeypatch.setattr(mixer.get_submodule(name), "parameters", lambda weight=weight: iter([weight]))
    read = [name for name in ("in_proj", "x_proj", "out_proj") if kernel_reads(mixer, name)]
    assert read == ([] if device == "cpu" else ["x_proj", "out_proj"])


def test_targets_that_a_fused_kernel_reads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.injection.targets.kernel_reads", lambda parent, name: name == "x_proj")
    with pytest.warns(UserWarning, match="a fused kernel may read the weights of x_proj in place of calling"):
        get_peft_model(tiny("mamba"), LoraConfig(target_modules=["in_proj", "x_proj"]))
