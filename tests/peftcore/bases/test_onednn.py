"""`peftcore.bases.onednn`: when oneDNN multiplies, and that its product is that of `F.linear`."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.bases import onednn

if not onednn.is_usable():
    pytest.skip("this PyTorch does not contain oneDNN's product", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Inputs of oneDNN's product, as on a CPU where MKL is slow."""
    seen: list[Tensor] = []
    product = onednn.product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(x)
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(onednn, "product", counted)
    yield seen


def weight_of(outputs: int = 1024, inputs: int = 512) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 1, 512), (7, 1, 512), (64, 1, 512)])
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_product_is_that_of_linear(calls: list[Tensor], shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(1)
    x, bias = torch.randn(shape), torch.randn(1024) if with_bias else None
    for weight in (weight_of(), weight_of(512, 1024).T):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        y = onednn.linear(x, weight, bias)
        assert y.shape == exact.shape and y.dtype == torch.float32
        assert (y - exact).norm() <= 2e-6 * exact.norm()
    assert len(calls) == 2


@torch.no_grad()
def test_strided_input(calls: list[Tensor]) -> None:
    x = torch.randn(4, 3, 512)[:, -1:]
    torch.testing.assert_close(onednn.linear(x, weight_of()), x @ weight_of().T, rtol=1e-5, atol=1e-4)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.ones(1, 1, 8), weight_of(4, 8)),
        (torch.ones(1, 1, 511), weight_of(1024, 511)),
        (torch.ones(1, 2, 512), weight_of()),
        (torch.ones(65, 1, 512), weight_of()),
        (torch.ones(0, 1, 512), weight_of()),
        (torch.ones(1, 512), weight_of()),
        (torch.ones(1, 1, 512).double(), weight_of().double()),
        (torch.ones(1, 1, 512).bfloat16(), weight_of().bfloat16()),
        (torch.ones(1, 1, 512, device="meta"), weight_of().to("meta")),
    ],
    ids=[
        "small weight",
        "just too small a weight",
        "two tokens",
        "many rows",
        "no rows",
        "no axis of tokens",
        "float64",
        "bfloat16",
        "meta device",
    ],
)
def test_linear_multiplies_everything_else(calls: list[Tensor], x: Tensor, weight: Tensor) -> None:
    y = onednn.linear(x, weight)
    assert y.shape == (*x.shape[:-1], len(weight)) and y.dtype == x.dtype
    assert not calls


def test_with_gradients_the_product_has_them(calls: list[Tensor]) -> None:
    x = torch.ones(1, 1, 512, requires_grad=True)
    onednn.linear(x, weight_of()).sum().backward()
    assert x.grad is not None and not calls
    torch.testing.assert_close(x.grad[0, 0], weight_of().sum(0), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_pytorchs_modes_are_followed(calls: list[Tensor]) -> None:
    x, weight = torch.ones(1, 1, 512), weight_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(x, weight).dtype == torch.bfloat16
    torch._C._set_mkldnn_enabled(False)  # the public switch also sets TF32, and then warns
    try:
        onednn.linear(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not calls
    onednn.linear(x, nn.Parameter(weight))
    assert len(calls) == 1


def test_another_interface_of_pytorch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*arguments: object) -> Tensor:
        raise TypeError("linear_pointwise() takes 7 arguments")

    monkeypatch.setattr(onednn, "product", changed)
    assert onednn.is_usable.__wrapped__() is False


@pytest.mark.parametrize("maker, slow", [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)])
def test_only_cpus_made_by_amd(monkeypatch: pytest.MonkeyPatch, maker: str, slow: bool) -> None:
    monkeypatch.setattr(onednn, "_cpu_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn.mkl_is_slow.__wrapped__() is slow


@torch.no_grad()
def test_only_decoding_steps_of_a_model_are_rounded_in_another_way(calls: list[Tensor]) -> None:
    """The adapters change nothing, so a text has the base's outputs to the bit."""
    net = nn.Sequential(nn.Linear(256, 2048), nn.Linear(2048, 512))
    text, step = torch.randn(2, 9, 256), torch.randn(2, 1, 256)
    of_text, of_step = net(text), net(step)
    model = get_peft_model(net, LoraConfig(target_modules=["0", "1"]))
    model.add_adapter("b", LoraConfig(target_modules=["0", "1"]))
    model.eval()
    assert torch.equal(model(text), of_text) and not calls
    torch.testing.assert_close(model(step), of_step, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    torch.testing.assert_close(model(step, adapter_names=["default", "b"]), of_step, rtol=1e-5, atol=1e-6)
    assert len(calls) == 4
    assert torch.equal(model(text, adapter_names=["default", "b"]), of_text) and len(calls) == 4
