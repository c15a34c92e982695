"""What a training loop calls: regularisers, the update after a step, state for checkpoints, quantised models."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import AdaLoraConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training


def adalora() -> Any:
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, tinit=0, tfinal=1, total_step=4)
    return get_peft_model(nn.Sequential(nn.Linear(6, 6)), config)


def test_adaloras_regulariser_is_the_distance_of_its_factors_from_orthogonality() -> None:
    model = adalora()
    left, right = (next(p for n, p in model.named_parameters() if name in n) for name in ("lora_B", "lora_A"))
    distances = [(gram - torch.eye(4)).square().sum() for gram in (left.T @ left, right @ right.T)]
    weight = model.peft_config["default"].orth_reg_weight
    torch.testing.assert_close(model.adapter_regularizer(), weight * torch.stack(distances).mean())
    assert model._get_kasa_loss() == model._get_monteclora_loss() == 0.0


def test_a_lora_has_no_regulariser() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert model.adapter_regularizer() is None


def test_the_state_of_training_comes_back() -> None:
    model, x = adalora(), torch.randn(3, 6)
    for step in (1, 2):
        model(x).square().sum().backward()
        model.on_optimizer_step(step)
    state = model.adapter_state()
    assert state and all(key.startswith("default/0/") for key in state)
    resumed = adalora()
    assert any(not torch.equal(tensor, state[key]) for key, tensor in resumed.adapter_state().items())
    resumed.load_adapter_state(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in resumed.adapter_state().items())


def llama() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def test_a_prepared_model_is_frozen_in_float32_and_checkpoints() -> None:
    model: Any = prepare_model_for_kbit_training(llama().bfloat16())
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.is_activation_checkpointing
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_the_embeddings_output_requires_grad_for_checkpointing() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad
    assert model.prepare_model_for_gradient_checkpointing(model) is model
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
