"""What the VB-LoRA paper says: tiles mixed from one bank by their top-k logits, and the small form on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import nn

from peftcore import ConfigError, PeftModel, TrainingError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.vblora import VBLoRAConfig

EXAMPLE = Example(
    VBLoRAConfig,
    options={"r": 3, "num_vectors": 10, "vector_length": 4},
    starts_at_base=False,
    theirs="VBLoRAConfig",
    parity={
        "plain": {"r": 4, "num_vectors": 20, "vector_length": 8},
        "top k": {"r": 4, "num_vectors": 20, "vector_length": 16, "topk": 3, "save_only_topk_weights": True},
        "top 1": {"r": 4, "num_vectors": 300, "vector_length": 8, "topk": 1, "save_only_topk_weights": True},
        "biases": {"r": 4, "num_vectors": 20, "vector_length": 8, "bias": "vblora_only"},
    },
)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).double()
    defaults = {"r": 3, "num_vectors": 10, "vector_length": 4, "target_modules": ["0", "1"]}
    model = get_peft_model(plain, VBLoRAConfig(**{**defaults, **options}))
    randomise(model, 0.5)
    return model


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


@pytest.mark.parametrize("k", [1, 2, 10])
def test_the_papers_formula(k: int) -> None:
    """Tile by tile: the k best vectors, weighted by the softmax over their logits alone."""
    model = net(topk=k)
    adapter = layers(model)[0]
    bank = adapter.shared.vblora_vector_bank

    def tile(logits: torch.Tensor) -> torch.Tensor:
        best = sorted(range(10), key=lambda j: -logits[j])[:k]
        weights = [logits[j].exp() for j in best]
        return sum(w * bank[j] for w, j in zip(weights, best, strict=True)) / sum(weights)

    a = torch.stack([torch.cat([tile(adapter.vblora_logits_A[row, t]) for t in range(2)]) for row in range(3)])
    b = torch.stack([torch.cat([tile(adapter.vblora_logits_B[t, row]) for t in range(3)]) for row in range(3)]).T
    x = torch.randn(5, 8, dtype=torch.float64)
    layer = model[0].base_layer
    torch.testing.assert_close(model[0](x), x @ (layer.weight + b @ a).T + layer.bias, rtol=1e-12, atol=1e-12)


def test_layers_train_one_bank_together() -> None:
    model = net()
    first, second = layers(model)
    assert first.shared is second.shared
    logits = 10 * 3 * (2 + 3) + 10 * 3 * (3 + 1)
    assert model.get_nb_trainable_parameters()[0] == 10 * 4 + logits
    model[1](torch.randn(2, 12, dtype=torch.float64)).square().sum().backward()
    assert first.shared.vblora_vector_bank.grad is not None and first.vblora_logits_A.grad is None


def test_start_values() -> None:
    config = VBLoRAConfig(r=64, num_vectors=100, vector_length=64, init_logits_std=0.3, init_vector_bank_bound=0.05)
    config.target_modules = {"0"}
    adapter = layers(get_peft_model(nn.Sequential(nn.Linear(64, 64)), config))[0]
    assert abs(adapter.vblora_logits_A.std().item() / 0.3 - 1) < 0.05
    bank = adapter.shared.vblora_vector_bank
    assert bank.abs().max() <= 0.05 and abs(bank.std().item() * 12**0.5 / 0.1 - 1) < 0.05


@pytest.mark.parametrize("vectors, kind", [(255, torch.uint8), (256, torch.int16), (2**15, torch.int32)])
def test_top_k_directory_holds_k_indices_and_k_minus_1_weights(vectors: int, kind: torch.dtype, tmp_path: Path) -> None:
    model = net(num_vectors=vectors, topk=3, save_only_topk_weights=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(key.rsplit(".", 1)[-1] for key in tensors if ".model.0." in key) == [
        *("vblora_logits_A_topk_indices", "vblora_logits_A_topk_weights"),
        *("vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights"),
    ]
    assert tensors["base_model.model.0.vblora_logits_A_topk_indices"].dtype == kind
    assert tensors["base_model.model.0.vblora_logits_B_topk_weights"].shape == (3, 3, 2)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-12, atol=1e-12)


def test_saturated_weights_survive_the_top_k_directory(tmp_path: Path) -> None:
    """A last weight of zero, which rounding may turn negative, must not become NaN."""
    model = net(topk=3, save_only_topk_weights=True)
    with torch.no_grad():
        for adapter in layers(model):
            adapter.vblora_logits_A.mul_(100)
            adapter.vblora_logits_B.mul_(100)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected, rtol=1e-9, atol=1e-9)


def test_a_top_k_directory_is_not_for_training(tmp_path: Path) -> None:
    model = net(save_only_topk_weights=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    model.train()(x).sum().backward()  # before it is saved and read again it trains
    state = model.adapter_state()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True).train()
    with pytest.raises(TrainingError, match="save_only_topk_weights"):
        loaded(x)
    loaded.load_adapter_state(state)  # a training checkpoint keeps all logits beside it
    loaded(x).sum().backward()
    assert all(bool(adapter.vblora_logits_A.isfinite().all()) for adapter in layers(loaded))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "topk must be a positive integer; got 0"),
        ({"topk": 300}, "must not exceed num_vectors=256; got 300"),
        ({"bias": "some"}, "'vblora_only'; got 'some'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VBLoRAConfig(**options)


def test_vectors_must_tile_the_layer() -> None:
    with pytest.raises(ConfigError, match="1 has out_features=4, got vector_length=3"):
        net(vector_length=3, target_modules=["1"])
