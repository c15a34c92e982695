"""DoRA: the paper's statements, parity with HF PEFT, and the cost of the row lengths."""

import copy
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from lora_nets import LAYERS, adapter, lora, net_and_input
from method_example import randomise
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peftcore.methods.lora.variants.dora import row_lengths

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


@pytest.mark.parametrize("layer", LAYERS)
def test_dora_is_direction_times_magnitude(layer: str) -> None:
    net, x = net_and_input(layer)
    net = lora(net, use_dora=True)
    randomise(net, 0.3)
    a = adapter(net)
    v = a.base.read() + a.delta_weight()
    lengths = v.flatten(1).norm(dim=1)
    ones = (1,) * (v.dim() - 1)
    expected = v / lengths.view(-1, *ones) * a.lora_magnitude_vector_weight.view(-1, *ones)
    torch.testing.assert_close(a.merged_weight(a.base.read()), expected, rtol=1e-10, atol=1e-10)
    adapted = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
def test_dora_starts_at_the_base_with_its_own_lengths(layer: str) -> None:
    net, x = net_and_input(layer)
    base = net(x)
    net = lora(net, use_dora=True)
    torch.testing.assert_close(net(x), base, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        adapter(net).lora_magnitude_vector_weight, adapter(net).base.read().flatten(1).norm(dim=1)
    )


@pytest.mark.parametrize("storage", ["bfloat16", "nf4"])
def test_dora_starts_at_the_output_of_a_base_that_computes_in_16_bits(storage: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(64, 32)
    if storage == "nf4":
        made: Any = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.bfloat16)
        made.load_state_dict(layer.state_dict())
        layer = made.to("cpu")
    else:
        layer.to(torch.bfloat16)
    net, x = nn.Sequential(layer).train(), torch.randn(40, 64, dtype=torch.bfloat16)
    base = net(x)
    net = get_peft_model(net, LoraConfig(r=4, target_modules=["0"], use_dora=True))
    assert torch.equal(net(x), base)
    lengths = adapter(net).base.read().double().norm(dim=1)
    torch.testing.assert_close(adapter(net).lora_magnitude_vector_weight.double(), lengths, rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", [True, "pissa"])
def test_dora_with_dropout_drops_the_input_of_both_parts(start: Any) -> None:
    net, x = net_and_input("linear")
    net = lora(net, use_dora=True, lora_dropout=0.5, init_lora_weights=start)
    randomise(net, 0.3)
    a, layer = adapter(net), net[0].base_layer
    torch.manual_seed(5)
    got = net.train()(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    taken_out = 0 if a.start is None else a._product(*a.start)
    w = layer.weight - taken_out
    low_rank = a._product(a.lora_A_weight, a.lora_B_weight)
    ratio = a.lora_magnitude_vector_weight / (w + low_rank).norm(dim=1)
    expected = x @ w.T + layer.bias + (ratio - 1) * (dropped @ w.T) + ratio * (dropped @ low_rank.T)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_length_gets_no_gradient() -> None:
    net, x = net_and_input("linear")
    net = lora(net, use_dora=True)
    randomise(net, 0.3)
    a, layer = adapter(net), net[0].base_layer
    net(x).square().sum().backward()
    got = a.lora_B_weight.grad.clone()
    b = a.lora_B_weight.detach().clone().requires_grad_()
    v = layer.weight + a.scaling * b @ a.lora_A_weight
    y = x @ (v * (a.lora_magnitude_vector_weight / v.norm(dim=1).detach())[:, None]).T + layer.bias
    y.square().sum().backward()
    torch.testing.assert_close(got, b.grad, rtol=1e-9, atol=1e-9)


def test_dora_never_builds_the_product_of_its_factors() -> None:
    """The lengths of the rows of W + sBA follow from small products; PEFT multiplies an identity matrix through."""
    net = lora(nn.Sequential(nn.Linear(40, 30)), use_dora=True)
    hf = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 30)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    products: dict[str, set[tuple[int, ...]]] = {}
    for name, model in (("ours", net), ("peft", hf)):
        with Products() as seen:
            model(torch.randn(3, 40))
        products[name] = seen.shapes
    assert {(30, 40), (40, 30)} & products["peft"] and not {(30, 40), (40, 30)} & products["ours"]


class Products(TorchDispatchMode):
    """Shapes of the matrix products computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.shapes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("layer", LAYERS)
def test_dora_beside_a_merged_adapter_has_the_lengths_of_the_unmerged_weight(layer: str) -> None:
    net, x = net_and_input(layer)
    net = lora(net, use_dora=True)
    net.set_requires_grad("default", False)
    net.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    randomise(net.eval(), 0.3)
    net.set_requires_grad("default", True)
    randomise(net, 0.3)
    a, weight = adapter(net), adapter(net).base.read().clone()
    lengths = (weight + a.delta_weight()).flatten(1).norm(dim=1)
    for active in (["b", "default"], ["default", "b"]):
        net.set_adapter(active)
        both = net(x)
        for merged in (["b"], ["default"], active):
            if merged == active[1:]:
                continue  # the first would then act on top of the second
            net.merge_adapter(merged)
            torch.testing.assert_close(net(x), both, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(row_lengths(a), lengths, rtol=1e-10, atol=1e-10)
            net.unmerge_adapter()


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_dora_parity_on_convolutions_and_embeddings(kind: str, tmp_path: Any) -> None:
    net, x = net_and_input(kind)
    net = net.float()
    x = x.float() if x.is_floating_point() else x
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], "use_dora": True}
    hf = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**options)).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path, save_embedding_layers=False)
    here = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(here(x), hf(x), rtol=1e-5, atol=1e-5)
    here.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours").eval()
    torch.testing.assert_close(there(x), hf(x), rtol=1e-5, atol=1e-5)


def test_dora_compiles_into_one_graph_and_follows_its_base_there() -> None:
    net, x = net_and_input("linear")
    model = lora(net, use_dora=True)
    randomise(model, 0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model[0].base_layer.weight.mul_(3)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_convolution_with_groups_computes_what_peft_does() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, groups=2)
    options: dict[str, Any] = {"r": 4, "target_modules": ["0"], "use_dora": True, "init_lora_weights": False}
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(**options))
    randomise(theirs, 0.3)
    ours = get_peft_model(nn.Sequential(layer), LoraConfig(**options))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_lengths_are_computed_on_the_chosen_device() -> None:
    net, _ = net_and_input("linear")
    part = adapter(lora(net, use_dora=True))
    assert row_lengths(part, torch.device("meta")).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layer", LAYERS)
def test_lengths_of_layers_on_the_cpu_are_computed_on_the_gpu(layer: str) -> None:
    plain, x = net_and_input(layer)
    base = plain(x)
    torch.cuda.reset_peak_memory_stats()
    net = lora(plain, use_dora=True, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert torch.cuda.max_memory_allocated() > 0
    assert adapter(net).lora_magnitude_vector_weight.device.type == "cpu"
    torch.testing.assert_close(net(x), base, rtol=1e-12, atol=1e-12)
