"""LoRA on nn.MultiheadAttention: two raw projections, whatever fast path PyTorch would take around them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import peft
from method_example import randomise
from parity_log import agree
from torch import Tensor, nn

from peftcore import ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model
from peftcore.methods.loha import LoHaConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # PyTorch's own path takes them

OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["self_attn", "cross"]}


class Attending(nn.Module):
    """PyTorch's own encoder and an attention that reads another input than its queries."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 4:] = True
        read = self.encoder(x, src_key_padding_mask=padding)
        return self.cross(x, read, read, key_padding_mask=padding, need_weights=False)[0]


def build(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Attending().to(dtype).eval()


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, 8)


def adapted(**options: Any) -> Any:
    model = get_peft_model(build(), LoraConfig(**OPTIONS, **options)).eval()
    randomise(model, 0.2)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"cross": 3}, "alpha_pattern": {"self_attn": 5}}])
def test_parity(options: dict[str, Any], tmp_path: Path) -> None:
    x = inputs()
    hf = peft.get_peft_model(build(), peft.LoraConfig(**OPTIONS, **options)).train()  # without PyTorch's fast path
    randomise(hf, 0.2)
    hf.save_pretrained(tmp_path / "hf")
    here = PeftModel.from_pretrained(build(), tmp_path / "hf")
    assert (here(x) - build()(x)).abs().max() > 1e-2
    agree(here(x), hf(x), "LORA", "MultiheadAttention", made_by="peft")

    ours = adapted(**options)
    ours.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").train()
    agree(ours(x), there(x), "LORA", "MultiheadAttention", made_by="peftcore")


@pytest.mark.parametrize("training", [True, False])
def test_both_projections_act_and_train(training: bool) -> None:
    model, x = adapted().train(training), inputs()
    model(x).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 3 * 2 * 2
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_is_the_forward_and_unmerging_exact(dtype: torch.dtype) -> None:
    model = get_peft_model(build(dtype), LoraConfig(**OPTIONS)).eval()
    randomise(model, 0.2)
    x = inputs().to(dtype)
    before, expected = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    model.merge_adapter()
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.2}
    torch.testing.assert_close(model(x), expected, **near)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), build(dtype)(x), **near)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model.merge_and_unload()(x), expected, **near)


def test_two_adapters_and_the_plain_module_again() -> None:
    model, x = adapted(), inputs()
    one = model(x)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["cross", "linear1"]))
    randomise(model, 0.5)
    model.set_adapter(["default", "other"])
    assert not torch.allclose(model(x), one)
    model.delete_adapter("other")
    model.set_adapter("default")
    plain = model.unload()
    assert type(plain.cross) is nn.MultiheadAttention
    with torch.no_grad():
        assert torch.equal(plain(x), build().requires_grad_(False)(x))  # by the fused path again


def test_what_does_not_fit_is_refused() -> None:
    for options in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match="raw parameter"):
            get_peft_model(build(), LoraConfig(**OPTIONS, **options))
    with pytest.raises(TargetError, match=r"pissa.*linear"):
        get_peft_model(build(), LoraConfig(**OPTIONS, init_lora_weights="pissa"))
    with pytest.raises(TargetError, match="LOHA does not adapt MultiheadAttention"):
        get_peft_model(build(), LoHaConfig(target_modules=["cross"]))
    unequal = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=6)})
    with pytest.raises(TargetError, match="target_parameters"):
        get_peft_model(unequal, LoraConfig(target_modules=["attention"]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_model_reads_batch_first_of_an_adapted_attention(batch_first: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    model: Any = get_peft_model(nn.Sequential(attention), LoraConfig(r=2, target_modules=["0"]))
    assert model[0] is not attention
    assert model[0].batch_first is batch_first
