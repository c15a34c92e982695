"""16 bits: adapters cast to bfloat16 or float16 work on CPUs, and small changes act on 16-bit activations."""

from typing import Any

import peft
import pytest
import torch
from contract_cases import EXAMPLES, cases_of
from method_example import randomise
from net import Net
from torch import Tensor, nn

import peftcore
from peftcore import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set

LAYERS: dict[str, tuple[str, Any, Any]] = {
    "Linear": ("linear", lambda: nn.Linear(12, 8), lambda: torch.randn(3, 5, 12)),
    "Conv2d": ("conv", lambda: nn.Conv2d(6, 8, 3), lambda: torch.randn(2, 6, 9, 9)),
    "Embedding": ("embedding", lambda: nn.Embedding(20, 8), lambda: torch.randint(0, 20, (3, 5))),
    "LayerNorm": ("norm", lambda: nn.LayerNorm(12), lambda: torch.randn(3, 5, 12)),
}
CASES = cases_of(LAYERS)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@HALVES
@pytest.mark.parametrize("method, layer", CASES)
def test_a_model_cast_to_16_bits_computes_trains_and_merges(method: str, layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    _, make, inputs = LAYERS[layer]
    example, x = EXAMPLES[method], inputs()
    config = example.make(layer, target_modules=["target"])
    net = get_peft_model(Net(make()), config)
    randomise(net, example.spread)
    for adapter in adapter_set(net).adapters("default").values():
        adapter.eval()  # Poly draws its mixture anew in each training forward
    net.to(dtype).to(torch.float64)  # the values that 16 bits hold
    wanted = net.target(cast(x, dtype).double() if x.is_floating_point() else x).detach()
    net.to(dtype)
    y = net.target(cast(x, dtype))
    assert y.dtype == dtype
    close = 8 * torch.finfo(dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=close)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    if example.merges:
        net.merge_adapter()
        torch.testing.assert_close(net.target(cast(x, dtype)).double(), wanted, rtol=0, atol=2 * close)


class Change:
    """The change that an adapter near its start makes to a layer of 64 features: in 16 bits and in float64."""

    def __init__(self, config: Any, make: Any, inputs: Any, dtype: torch.dtype, spread: float):
        torch.manual_seed(0)
        net = get_peft_model(Net(make().to(dtype)), config)
        randomise(net, spread)
        x = inputs().to(dtype)
        self.axis = -1 if x.dim() == 2 else 1
        with net.disable_adapter():
            base = net.target(x).double()
        self.narrow = net.target(x)
        self.narrow.float().square().sum().backward()
        gradients = [p.grad.double() for p in net.parameters() if p.requires_grad]
        self.narrow = self.narrow.detach().double() - base
        net.double().zero_grad()
        x = x.double()
        with net.disable_adapter():
            base = net.target(x)
        wide = net.target(x)
        wide.square().sum().backward()
        self.wide = (wide - base).detach()
        wanted = [p.grad for p in net.parameters() if p.requires_grad]
        gap = sum(float((g - w).square().sum()) for g, w in zip(gradients, wanted, strict=True))
        self.gradient_error = (gap / sum(float(w.square().sum()) for w in wanted)) ** 0.5

    def error(self) -> float:
        """How far the change of each output feature is from the true one, rounding of single outputs averaged out.

        As a share of the true change, over all features (root mean square).
        """
        narrow, wide = (change.movedim(self.axis, 0).flatten(1) for change in (self.narrow, self.wide))
        true = wide.square().sum(1)
        shares = (narrow * wide).sum(1) / true
        return float((true * (shares - 1).square()).sum().div(true.sum()).sqrt())


def linear(bias: bool) -> Any:
    return lambda: nn.Linear(64, 64, bias=bias)


def conv() -> nn.Module:
    return nn.Conv2d(64, 64, 3)


def tokens() -> Tensor:
    return torch.randn(4096, 64)


def images() -> Tensor:
    return torch.randn(8, 64, 12, 12)


def norm() -> nn.Module:
    return nn.LayerNorm(64)


def of(method: str, **options: Any) -> Any:
    return EXAMPLES[method].config(target_modules=["target"], **options)


IA3_OF_INPUTS = IA3Config(target_modules=["target"], feedforward_modules=["target"])
DORA = LoraConfig(target_modules=["target"], r=4, use_dora=True)
MULTIPLYING = {
    "IA3": (of("IA3", feedforward_modules=[]), linear(True), tokens),
    "IA3 of a convolution": (of("IA3", feedforward_modules=[]), conv, images),
    "IA3 of inputs": (IA3_OF_INPUTS, linear(True), tokens),
    "RoAd": (of("ROAD"), linear(True), tokens),
    "RoAd 2": (of("ROAD", variant="road_2"), linear(True), tokens),
    "BOFT": (of("BOFT", boft_n_butterfly_factor=2), linear(True), tokens),
    "BOFT without bias": (of("BOFT"), linear(False), tokens),
    "BOFT of a convolution": (of("BOFT"), conv, images),
    "OFT": (of("OFT", oft_block_size=16), linear(True), tokens),
    "OFT, exact": (of("OFT", oft_block_size=16, use_cayley_neumann=False), linear(True), tokens),
    "OFT of a convolution": (of("OFT", oft_block_size=16), conv, images),
    "HRA": (of("HRA", r=8), linear(True), tokens),
    "HRA of a convolution": (of("HRA", r=8), conv, images),
    "MiSS bat": (of("MISS", r=16, init_weights="bat"), linear(True), tokens),
    "DoRA": (DORA, linear(True), tokens),
    "DoRA without bias": (DORA, linear(False), tokens),
    "DoRA of a convolution": (DORA, conv, images),
    "LN tuning": (LNTuningConfig(target_modules=["target"]), norm, tokens),
}


@HALVES
@pytest.mark.parametrize("case", MULTIPLYING)
def test_changes_as_small_as_the_precision_of_16_bits_act_and_train(case: str, dtype: torch.dtype) -> None:
    change = Change(*MULTIPLYING[case], dtype, spread=torch.finfo(dtype).eps)
    assert change.error() < 0.15
    assert change.gradient_error < 0.03


UNIFORM = {
    "IA3": (IA3Config, {"feedforward_modules": []}, "ia3_l"),
    "DoRA": (LoraConfig, {"r": 4, "use_dora": True}, "lora_magnitude_vector"),
    "BOFT": (EXAMPLES["BOFT"].config, {"boft_block_size": 4}, "boft_s"),
    "RoAd": (EXAMPLES["ROAD"].config, {}, "road_alpha"),
}


@pytest.mark.filterwarnings("ignore")  # peft looks for BOFT's CUDA extension
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", UNIFORM)
def test_a_multiplier_of_1_003_acts_in_bfloat16_as_it_does_with_peft(case: str, bias: bool) -> None:
    kind, options, name = UNIFORM[case]
    gains = []
    for tool in (peftcore, peft):
        torch.manual_seed(0)
        net: Any = nn.Sequential(nn.Linear(64, 64, bias=bias), nn.Identity()).bfloat16()
        x = torch.randn(4096, 64).bfloat16()
        base = net(x).detach().double()
        net = tool.get_peft_model(net, getattr(tool, kind.__name__)(target_modules=["0"], **options))
        with torch.no_grad():
            for parameter in (p for n, p in net.named_parameters() if name in n):
                parameter.mul_(1.003)
        fixed = net.get_submodule("0" if tool is peftcore else "base_model.model.0").base_layer.bias
        scaled = 0 if fixed is None or case in ("IA3", "RoAd") else fixed.detach().double()
        gains.append(
            float(((net(x).detach().double() - scaled) * (base - scaled)).sum() / (base - scaled).square().sum())
        )
    ours, theirs = gains
    assert ours == pytest.approx(1.003, abs=2e-4)
    assert abs(ours - 1.003) <= abs(theirs - 1.003) + 1e-4
