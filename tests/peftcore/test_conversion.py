"""An adapter made a plain LoRA computes the same, here and in HF `peft`, or as nearly as its report says."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peftcore import (
    AdaLoraConfig,
    ConfigError,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftError,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peftcore.conversion import convert_directory_to_lora, convert_to_lora, save_as_lora
from peftcore.files import damaged_files
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
TOKENS = torch.arange(1, 25).view(2, 12)


def adalora(base: Any, **options: Any) -> Any:
    """Trained by random gradients until some layers have lost triplets, and one has lost them all."""
    torch.manual_seed(1)
    given: dict[str, Any] = {
        "init_r": 4,
        "target_r": 2,
        "total_step": 6,
        "target_modules": "all-linear",
        "lora_alpha": 12,
    }
    model = get_peft_model(base, AdaLoraConfig(init_lora_weights=False, **{**given, **options}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 7):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        first: Any = next(iter(adapter_set(model).of_method("default").values()))
        for parameter in first.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        model.on_optimizer_step(step, optimizer if step == 6 else None)
    return model.eval()


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def test_the_same_function_to_the_bit(tmp_path: Path) -> None:
    model = adalora(llama())
    expected, before = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    save_as_lora(model, tmp_path / "lora")
    here = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert torch.equal(here(TOKENS).logits, expected)
    assert (expected - llama()(TOKENS).logits).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert damaged_files(tmp_path / "lora") == []


def test_layers_keep_their_rank_and_scaling_and_those_of_rank_0_are_no_targets(tmp_path: Path) -> None:
    model = adalora(llama())
    layers: Any = adapter_set(model).of_method("default")
    ranks = {path: len(adapter.lora_E) for path, adapter in layers.items()}
    assert min(ranks.values()) == 0 < 2 < max(ranks.values())
    save_as_lora(model, tmp_path)
    config: Any = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig) and config.target_modules == {path for path, rank in ranks.items() if rank}
    loaded: Any = adapter_set(PeftModel.from_pretrained(llama(), tmp_path)).of_method("default")
    assert {path: adapter.r for path, adapter in loaded.items()} == {path: r for path, r in ranks.items() if r}
    assert all(adapter.scaling == pytest.approx(12 / 4.00001, rel=1e-15) for adapter in loaded.values())


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_hf_peft_reads_it_as_lora_whoever_trained_it(writer: str, tmp_path: Path) -> None:
    if writer == "ours":
        model = adalora(llama())
        save_as_lora(model, tmp_path / "lora")
    else:
        model = peft.get_peft_model(
            llama(),
            peft.AdaLoraConfig(init_r=4, target_r=2, total_step=6, deltaT=1, target_modules=["q_proj", "up_proj"]),
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
        for step in range(6):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)  # type: ignore[operator]
            optimizer.zero_grad()
        model.eval().save_pretrained(str(tmp_path / "adalora"))
        convert_directory_to_lora(tmp_path / "adalora", tmp_path / "lora")
    with torch.no_grad():
        expected = model(TOKENS).logits
        there = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "lora")).eval()
        assert there.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            PeftModel.from_pretrained(llama(), tmp_path / "lora")(TOKENS).logits, expected, rtol=1e-5, atol=1e-5
        )
        assert (expected - llama()(TOKENS).logits).abs().max() > 1e-3


def test_triplets_that_are_masked_and_not_pruned_are_left_out(tmp_path: Path) -> None:
    model = adalora(llama(), total_step=12)  # the budget is still falling
    layers: Any = adapter_set(model).of_method("default")
    assert any(0 < int(a.kept.sum()) < len(a.lora_E) for a in layers.values())
    save_as_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-6)
    found: Any = adapter_set(loaded).of_method("default")
    assert {path: a.r for path, a in found.items()} == {p: int(a.kept.sum()) for p, a in layers.items() if a.kept.any()}


def test_heads_and_biases_trained_with_it_come_along(tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=3, attention_bias=True)).eval()

    model = adalora(classifier(), task_type="SEQ_CLS", bias="all")
    save_as_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-6)
    assert not torch.equal(loaded.score.current().weight, classifier().score.weight)


class Nested(nn.Module):
    """A layer's path ends another's, as in a model inside of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.tanh(self.inner["proj"](x)))


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_a_name_that_ends_another_means_itself_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Nested(), torch.randn(3, 6)
    model = get_peft_model(
        copy.deepcopy(base), AdaLoraConfig(init_r=3, target_r=1, total_step=2, target_modules=["proj"])
    )
    layers: Any = adapter_set(model).of_method("default")
    torch.nn.init.ones_(layers["proj"].lora_E)
    for name, kept in (("proj", [True, False, True]), ("inner.proj", [False] * 3)):
        layers[name].kept = torch.tensor(kept)
        with torch.no_grad():
            layers[name]._silence_dropped()
    save_as_lora(model, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(there(x), model(x))
    assert not torch.equal(model(x), base(x))


def test_what_no_lora_equals_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="holds a LORA adapter; only ADALORA"):
        convert_directory_to_lora(tmp_path / "lora", tmp_path / "out")
    empty = adalora(llama())
    for adapter in adapter_set(empty).of_method("default").values():
        adapter.kept = torch.zeros(4, dtype=torch.bool)  # type: ignore[assignment]
        for name in ("lora_A", "lora_E"):
            setattr(adapter, name, nn.Parameter(getattr(adapter, name)[:0]))
        adapter.lora_B = nn.Parameter(adapter.lora_B[:, :0])  # type: ignore[index]
    with pytest.raises(ConfigError, match="every layer of this ADALORA adapter has rank 0"):
        save_as_lora(empty, tmp_path / "out")
    with_biases = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    with pytest.raises(ConfigError, match="lora_only"):
        save_as_lora(adalora(with_biases, bias="lora_only"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


OTHERS: dict[str, tuple[PeftConfig, int]] = {
    "dora": (LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False), 16),
    "loha": (LoHaConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False), 4),
    "lokr": (LoKrConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False), 16),
    "oft": (OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=4, r=0), 16),
    "ia3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), 16),
    "tokens": (LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[3, 5]), 2),
    "embedding": (LoHaConfig(target_modules=["embed_tokens", "q_proj"], r=2, init_weights=False), 4),
}
"""Methods, and the rank at which two factors are all of their change."""


def random_adapter(config: PeftConfig, base: Any = None) -> Any:
    model = get_peft_model(base or llama(), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", OTHERS)
def test_any_mergeable_method_becomes_a_lora_of_its_model(method: str) -> None:
    config, rank = OTHERS[method]
    model = random_adapter(config)
    expected = model(TOKENS).logits
    report = convert_to_lora(model, "default", "plain", rank=rank)
    assert report.error < 1e-5 and max(report.errors.values()) < 1e-5 and max(report.ranks.values()) <= rank
    assert torch.equal(model(TOKENS).logits, expected)  # the new one does not act yet
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (model(TOKENS).logits - expected).abs().max() > 3e-4


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 3}),
        LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", r=3, alpha_pattern={"q_proj": 2}),
        LoraConfig(target_modules=["embed_tokens", "lm_head"], r=3),
        VeraConfig(target_modules=["q_proj", "down_proj"], r=5),
    ],
    ids=["rslora", "pissa", "embedding", "vera"],
)
def test_low_rank_methods_convert_exactly_and_hf_peft_reads_them(config: PeftConfig, tmp_path: Path) -> None:
    model = random_adapter(config)
    report = save_as_lora(model, tmp_path)
    assert report.error == 0 and set(report.errors.values()) == {0}
    with torch.no_grad():
        expected = model(TOKENS).logits
        here = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
        there = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
        torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_proj", "v_proj"], r=6), OTHERS["loha"][0]])
def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_told(config: PeftConfig) -> None:
    model = random_adapter(config)
    report = convert_to_lora(model, "default", "plain", rank=2)
    layers: Any = adapter_set(model).adapters("plain")
    whole = missing = 0.0
    for path, adapter in adapter_set(model).adapters("default").items():
        delta, kept = adapter.delta_weight().detach(), layers[path].delta_weight().detach()
        best = torch.linalg.svdvals(delta.double())[2:].norm()
        assert (delta - kept).norm().item() == pytest.approx(best.item(), rel=1e-4)
        assert report.errors[path] == pytest.approx((best / delta.norm()).item(), rel=1e-4)
        whole, missing = whole + delta.square().sum().item(), missing + best.square().item()
    assert report.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)


def test_a_tolerance_gives_each_layer_the_least_rank_that_meets_it() -> None:
    model = random_adapter(LoHaConfig(target_modules="all-linear", r=3, init_weights=False))
    report = convert_to_lora(model, "default", "plain", tolerance=0.2)
    layers: Any = adapter_set(model).adapters("plain")
    assert len(set(report.ranks.values())) > 1 and 0 < report.error <= 0.2
    for path, adapter in adapter_set(model).adapters("default").items():
        sigma = torch.linalg.svdvals(adapter.delta_weight().detach().double())
        missing = [sigma[rank:].norm() / sigma.norm() for rank in range(len(sigma) + 1)]
        least = next(rank for rank, error in enumerate(missing) if error <= 0.2)
        assert report.ranks[path] == layers[path].r == least


def test_saved_modules_come_along_in_the_model() -> None:
    model = random_adapter(LoHaConfig(target_modules=["q_proj"], r=2, modules_to_save=["norm"], init_weights=False))
    expected = model(TOKENS).logits
    convert_to_lora(model, "default", "plain", tolerance=1e-6)
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "is a prompt"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), "aLoRA acts at some positions only"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "LORA changes the layer's bias too"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 changes the layer's bias too"),
        (LNTuningConfig(target_modules=["norm"]), "is a norm, which plain LoRA does not change"),
        (LoHaConfig(target_modules=["q_proj"]), "give rank=16, or tolerance="),
    ],
)
def test_what_two_factors_cannot_be_is_refused_and_nothing_is_half_made(config: PeftConfig, match: str) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = random_adapter(config, base)
    before = list(model.state_dict())
    limits = {} if isinstance(config, LoHaConfig) else {"rank": 4}
    with pytest.raises(PeftError, match=match):
        convert_to_lora(model, "default", "plain", **limits)
    assert list(model.state_dict()) == before and list(model.peft_config) == ["default"]
