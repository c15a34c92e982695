"""HF PEFT's modules of DoRA: outputs of scripts that call them, and `isinstance` of a layer's magnitudes."""

from typing import Any

import pytest
import torch
from peft.tuners.lora import dora as theirs
from peftcore.tuners.lora import dora as ours
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore import LoraConfig, get_peft_model

LAYERS = [
    ("DoraLinearLayer", nn.Linear(6, 5), (3, 6)),
    ("DoraLinearLayer", nn.Linear(6, 5, bias=False), (2, 3, 6)),
    ("DoraLinearLayer", Conv1D(5, 6), (3, 6)),
    ("DoraConv1dLayer", nn.Conv1d(4, 5, 3), (2, 4, 9)),
    ("DoraConv2dLayer", nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 9, 8)),
    ("DoraConv3dLayer", nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 4, 4)),
]


def factors(layer: nn.Module) -> tuple[Any, Any]:
    if isinstance(layer, nn.Linear | Conv1D):
        return nn.Linear(6, 2, bias=False).double(), nn.Linear(2, 5, bias=False).double()
    kind, base = type(layer), layer
    assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    inner = kind(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)  # type: ignore[arg-type]
    return inner.double(), kind(2, base.out_channels, 1, bias=False).double()  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "layer", "shape"), LAYERS, ids=lambda case: type(case).__name__)
def test_outputs_and_gradients_are_those_of_peft(name: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = layer.double()
    a, b = factors(layer)
    x = torch.randn(shape, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for module in (ours, theirs):
        dora: Any = getattr(module, name)(isinstance(layer, Conv1D))
        dora.update_layer(base_layer=layer, lora_A=a.weight * 2, lora_B=b.weight, scaling=0.7)
        arguments = {"lora_A": a, "lora_B": b, "scaling": 0.7, "base_layer": layer}
        for base_result in (None, layer(x).detach()):
            a.weight.grad = b.weight.grad = None
            y = dora(x, **arguments, base_result=base_result)
            y.square().sum().backward()
            results.append([dora.weight.detach(), y.detach(), dora.weight.grad, a.weight.grad, b.weight.grad])
        norm = dora.get_weight_norm(layer.weight.detach(), torch.zeros(()).double(), 1.0)
        results[-1] += [norm, dora.get_lora_weight(a, b).detach()]
    for mine, other in zip(results[:2], results[2:], strict=True):
        for one, two in zip(mine, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_embeddings_are_those_of_peft() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(7, 4).double()
    a, b = torch.randn(2, 7, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        dora = module.DoraEmbeddingLayer(fan_in_fan_out=True)
        dora.update_layer(base_layer=layer, lora_A=a, lora_B=b, scaling=0.5)  # type: ignore[no-untyped-call]
        dora.weight.data += 1
        arguments: dict[str, Any] = {"lora_A": a.T, "lora_B": b.T, "scaling": 0.5, "base_layer": layer}
        results.append(dora(torch.tensor([1, 5]), **arguments, embed_fn=lambda x, matrix: matrix[x]))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_magnitudes_may_stay_on_the_cpu() -> None:
    dora = ours.DoraLinearLayer(False)
    dora.update_layer(
        base_layer=nn.Linear(3, 2), lora_A=torch.ones(1, 3), lora_B=torch.zeros(2, 1), scaling=1, place_on_cpu=True
    )
    assert dora.weight.device.type == "cpu" and dora.weight.requires_grad


def test_the_magnitudes_of_a_layer_are_of_the_class_of_its_kind() -> None:
    names = ("DoraLinearLayer", "DoraEmbeddingLayer", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer")
    kinds = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    for layer in (nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1)):
        checks = []
        for number, library in enumerate(("peftcore", "peft")):
            module = __import__(library)
            config = module.LoraConfig(r=2, target_modules=["0"], use_dora=True)
            model = module.get_peft_model(nn.Sequential(type(layer)(*_sizes(layer))), config)
            adapted = model.base_model.model[0]
            magnitude = adapted.lora_magnitude_vector["default"]
            checks.append([isinstance(magnitude, kind[number]) for kind in kinds.values()])
            assert not isinstance(adapted, kinds["DoraLinearLayer"][number])
        assert checks[0] == checks[1]
    plain = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert not isinstance(plain[0].lora_A["default"], ours.DoraLinearLayer)


def _sizes(layer: nn.Module) -> tuple[int, ...]:
    return (4, 4) if isinstance(layer, nn.Linear | nn.Embedding) else (4, 4, 1)
