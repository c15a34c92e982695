"""LoftQ through params.yaml: on a quantised base the adapter starts at what quantising lost."""

import json
from pathlib import Path

import pytest
import torch

from flows.base.model import load_dequantized, load_original
from flows.data.rows import read_rows
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.stages import train
from flows.training.loftq import attach_adapter
from peftcore import AdaLoraConfig, LoraConfig, PeftModel
from peftcore.injection.adapter_set import adapter_set

STANDING_STILL = {"max_steps": 1, "learning_rate": 1e-12, "evaluations": 1}


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_adapter_starts_at_what_quantising_lost(prepared: Paths, tiny_params, storage: str) -> None:
    options = {"init_lora_weights": "loftq"}
    params = tiny_params(
        quantization={"storage": storage, "compute_dtype": "float32"},
        method={"options": options, "r": 8},
        train=STANDING_STILL,
    )
    train.run(params, prepared)
    model = PeftModel.from_pretrained(load_dequantized(prepared.base, params.quantization), prepared.adapter)
    original = load_original(prepared.base, torch.float32)
    for path, adapter in adapter_set(model).adapters("default").items():
        weight, base = original.get_submodule(path).weight, adapter.base.read().float()
        residual = weight - base
        left = torch.linalg.svdvals(residual)[8:].square().sum().sqrt()  # what the best approximation of rank 8 leaves
        assert (weight - adapter.merged_weight(base)).norm() < 1.05 * left + 1e-3 * residual.norm() < residual.norm()
    saved = json.loads((prepared.adapter / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True  # plain LoRA on a quantised base, for whoever loads it


@pytest.mark.parametrize(("storage", "wrong"), [("nf4", {"loftq_iter": 5}), ("int8", {"loftq_bits": 4})])
def test_what_the_storage_does_not_fit_is_refused(prepared: Paths, tiny_params, storage: str, wrong: dict) -> None:
    options = {"init_lora_weights": "loftq", "loftq_config": wrong}
    params = tiny_params(quantization={"storage": storage}, method={"options": options})
    with pytest.raises(StageError, match=rf"loftq_config is {wrong}.*storage is {storage}.*to none"):
        train.run(params, prepared)
    assert not prepared.adapter.exists()


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"init": "loftq"}, "method.init"),
        ({"options": {"init_lora_weights": "loftq"}}, "method.options.init_lora_weights"),
    ],
)
def test_a_base_without_the_weights_before_is_refused_by_the_key_that_was_set(method: dict, key: str) -> None:
    params = Params.model_validate(
        {"base": {"source": "path:a.gguf"}, "quantization": {"storage": "gguf"}, "method": method}
    )
    with pytest.raises(StageError, match=rf"^{key} is loftq, .*; give another {key}, or storage nf4$"):
        attach_adapter(params, None, LoraConfig(init_lora_weights="loftq"), Path())


def test_the_adapter_starts_at_what_quantising_lost_in_the_outputs(prepared: Paths, tiny_params) -> None:
    params = tiny_params(
        quantization={"storage": "nf4", "compute_dtype": "float32"},
        method={"init": "qera", "r": 8},
        train=STANDING_STILL,
    )
    train.run(params, prepared)
    model = PeftModel.from_pretrained(load_dequantized(prepared.base, params.quantization), prepared.adapter)
    original = load_original(prepared.base, torch.float32)
    ids = torch.tensor([read_rows(prepared.split("train"), ["input_ids"], 1)[0]["input_ids"]])
    with torch.no_grad():
        expected = original(ids).logits
        corrected, nearest = model(ids).logits, model.disable_adapter()
        with nearest:
            lost = (model(ids).logits - expected).norm()
    assert (corrected - expected).norm() < 0.9 * lost
    saved = json.loads((prepared.adapter / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True


def test_adalora_keeps_its_own_start(prepared: Paths) -> None:
    params = Params.model_validate({"base": {"source": "path:a.gguf"}, "quantization": {"storage": "gguf"}})
    with pytest.warns(UserWarning, match="init_lora_weights='loftq' has no effect"):
        config = AdaLoraConfig(target_modules=["0"], total_step=9, init_lora_weights="loftq")
    model = attach_adapter(params, torch.nn.Sequential(torch.nn.Linear(4, 4)), config, prepared.base)
    assert not adapter_set(model).adapters("default")["0"].delta_weight().any()
