"""A LoRA with reduced intruder dimensions: as in HF PEFT on linear layers, as in the paper on all others."""

import copy
import warnings
from typing import Any

import pytest
import torch
from conversion_models import TOKENS, llama, random_adapter
from torch import Tensor, nn

from peftcore import (
    AdapterNameError,
    ConfigError,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from peftcore.conversion import reduce_intruder_dimension
from peftcore.errors import ConversionError
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft
    from peft.tuners.lora.intruders import reduce_intruder_dimension as their_reduction

LINEAR: dict[str, Any] = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True, "rank_pattern": {"up_proj": 2}}], ids=["lora", "rslora"])
def test_it_is_that_of_hf_peft(kind: dict[str, Any]) -> None:
    options: dict[str, Any] = {"top_k": 2, "threshold_epsilon": 0.5, "mitigation_lambda": 0.2}
    base = llama().double()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**LINEAR, **kind)).eval()
    ours: Any = get_peft_model(base, LoraConfig(**LINEAR, **kind)).eval()
    tensors = {key: 2 * tensor.double() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    theirs, ours = theirs.double(), ours.double()
    peft.set_peft_model_state_dict(theirs, tensors)
    set_peft_model_state_dict(ours, tensors)
    before = ours(TOKENS).logits
    said: list[str] = []
    they_said: list[str] = []
    their_reduction(theirs, **options, logging_sink=they_said.append)
    reduce_intruder_dimension(ours, **options, logging_sink=said.append)
    assert said == [line.removeprefix("base_model.model.") for line in they_said]
    assert any(": Intruders: " in line for line in said) and any("No intruders" in line for line in said)
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-9, atol=1e-9)
    assert ours.active_adapters == ["intruder_reduced"] and not torch.allclose(ours(TOKENS).logits, before)
    ours.set_adapter("default")
    assert torch.equal(ours(TOKENS).logits, before)


class Layers(nn.Module):
    """An embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(self.embedding(tokens).mT)


def test_it_is_the_formula_of_the_paper_for_embeddings_and_convolutions() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["embedding", "conv"], r=2, lora_alpha=6, init_lora_weights=False)
    model: Any = get_peft_model(Layers().double(), config).double()
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.9, mitigation_lambda=0.0, logging_sink=None)
    for adapters in (adapter_set(model).layers[path].adapters for path in ("embedding", "conv")):
        weight = adapters["default"].base.read_unmerged().detach().flatten(1)
        change, reduced = (adapters[name].delta_weight().detach().flatten(1) for name in adapters)
        u, s, vh = torch.linalg.svd(weight + change, full_matrices=False)
        cosines = (u.mT @ torch.linalg.svd(weight, full_matrices=False)[0]).abs().amax(1)
        found = [n for n in range(3) if cosines[n] < 0.9]
        assert found
        left = change - sum(s[n] * torch.outer(u[:, n], vh[n]) for n in found)
        u, s, vh = torch.linalg.svd(left, full_matrices=False)
        torch.testing.assert_close(reduced, (u[:, :2] * s[:2]) @ vh[:2])


def test_without_intruders_it_is_a_copy_that_trains_alone() -> None:
    model = random_adapter(LoraConfig(**LINEAR, modules_to_save=["lm_head"]))
    expected = model(TOKENS).logits
    reduce_intruder_dimension(model, new_adapter_name="copy", threshold_epsilon=0.0, logging_sink=None)
    assert torch.equal(model(TOKENS).logits, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    assert not torch.allclose(model(TOKENS).logits, expected)
    model.set_adapter("default")
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_in_float32_for_a_model_in_16_bits(dtype: torch.dtype) -> None:
    model = random_adapter(LoraConfig(**LINEAR), llama().bfloat16())
    for adapter in adapter_set(model).adapters("default").values():
        adapter.to(dtype)
    reduce_intruder_dimension(model, threshold_epsilon=1.0, logging_sink=None)
    assert model(TOKENS).logits.isfinite().all()
    assert {p.dtype for n, p in model.named_parameters() if "intruder_reduced" in n} == {
        p.dtype for n, p in model.named_parameters() if ".default." in n
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(**{**LINEAR, "use_dora": True}), "takes a plain LoRA"),
        (LoraConfig(**{**LINEAR, "init_lora_weights": "pissa"}), "takes a plain LoRA"),
        (LoHaConfig(target_modules=["q_proj"], r=2), r"add_as_lora\(model, 'default', new_name\)"),
    ],
    ids=["dora", "pissa", "loha"],
)
def test_other_adapters_are_refused(config: PeftConfig, said: str) -> None:
    model = random_adapter(config)
    with pytest.raises(ConversionError, match=said):
        reduce_intruder_dimension(model, logging_sink=None)
    assert list(model.peft_config) == ["default"]


def test_names_and_counts_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model = random_adapter(LoraConfig(**LINEAR))
    with pytest.raises(ConfigError, match="top_k must be a number of singular vectors, at least 1; got 0"):
        reduce_intruder_dimension(model, top_k=0)
    for names in ({"old_adapter_name": "gone"}, {"new_adapter_name": "default"}):
        with pytest.raises(AdapterNameError):
            reduce_intruder_dimension(model, logging_sink=None, **names)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
