"""LoRA on raw parameters of experts, with replicated blocks, and with trained token rows."""

import copy
from typing import Any

import peft
import pytest
import torch
from lora_nets import TOKENS, adapter, llama
from method_example import randomise
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from peftcore import LoraConfig, PeftModel, TargetError, get_peft_model
from peftcore.injection.adapter_set import adapter_set

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    ).eval()


EXPERTS: dict[str, dict[str, Any]] = {
    "one parameter": {"target_parameters": ["experts.gate_up_proj"]},
    "two of one module and layers": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3},
    },
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_parity(case: str, tmp_path: Any) -> None:
    options = {"r": 2, "lora_alpha": 6, **EXPERTS[case]}
    options["target_modules"] = options.get("target_modules", [])
    hf = peft.get_peft_model(mixtral(), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path / "hf")
    expected = hf(TOKENS).logits
    here = PeftModel.from_pretrained(mixtral(), tmp_path / "hf")
    torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - mixtral()(TOKENS).logits).abs().max() > 1e-3
    here.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "ours").eval()
    torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_experts_merge_unmerge_switch_and_leave() -> None:
    model = mixtral()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = model(TOKENS).logits
    model = get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    assert len(adapter_set(model).layers) == 4
    torch.testing.assert_close(model(TOKENS).logits, base)
    randomise(model, 0.3)
    adapted = model(TOKENS).logits
    model(TOKENS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, adapted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    model.unmerge_adapter()
    assert torch.equal(model(TOKENS).logits, adapted)
    model.add_adapter("other", LoraConfig(r=3, target_parameters=["experts.down_proj"]))
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(TOKENS).logits, adapted)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, model(TOKENS).logits)
    plain = model.unload()
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def test_experts_what_does_not_fit() -> None:
    for names, message in ((["experts.gate_pu_proj"], "gate_up_proj"), (["norm.weight"], "only \\(o, i\\)")):
        with pytest.raises(TargetError, match=message):
            get_peft_model(mixtral(), LoraConfig(target_parameters=names))


def stacked(transposed: bool) -> nn.Module:
    """Experts kept as (e, i, o), with `is_transposed` as transformers marks it, or as (e, o, i)."""

    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn((3, 6, 4) if transposed else (3, 4, 6), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eio->beo" if self.is_transposed else "bi,eoi->beo", x, self.up)

    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts()})


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_either_orientation(transposed: bool, tmp_path: Any) -> None:
    """On disk A is (e·r, i) and B (o, r·e), expert by expert in A and rank by rank in B."""
    net = stacked(transposed)
    x, up = torch.randn(2, 6, dtype=torch.float64), net["experts"].up.detach().clone()
    net = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.up"], init_lora_weights=False))
    a = adapter(net, "experts.up")
    assert a.lora_A_weight.shape == (6, 6) and a.lora_B_weight.shape == (4, 6)
    delta = 3 * torch.einsum("ore,eri->eoi", a.lora_B_weight.reshape(4, 2, 3), a.lora_A_weight.reshape(3, 2, 6))
    expected = up + (delta.transpose(1, 2) if transposed else delta)
    adapted = net["experts"](x)
    torch.testing.assert_close(adapted, torch.einsum("bi,eio->beo" if transposed else "bi,eoi->beo", x, expected))
    net.save_pretrained(tmp_path)
    net.merge_adapter()
    torch.testing.assert_close(net["experts"].up, expected)
    net.unmerge_adapter()
    plain = net.unload()
    assert torch.equal(plain["experts"].up, up)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)["experts"](x), adapted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[1, 5, 39], {"embed_tokens": [1, 5]}])
def test_lora_with_trainable_tokens_parity(tied: bool, tokens: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    hf = peft.get_peft_model(llama(tie_word_embeddings=tied), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path / "hf")
    expected = hf(TOKENS).logits
    here = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "hf")
    torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    here.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    merged = here.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
