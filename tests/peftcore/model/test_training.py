"""What a training loop calls: regularisers, the update after a step, state for checkpoints, quantised models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quantised_layers import with_one_nf4_layer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peftcore import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def rows(tokens: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


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


def test_the_models_loss_contains_adaloras_regulariser_as_in_hf_peft(tmp_path: Path) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, tinit=0, tfinal=1, total_step=4)
    model: Any = get_peft_model(llama(), config)
    tokens, arguments = torch.arange(8)[None], {"logging_steps": 1, "max_steps": 1, "report_to": "none"}
    regularizer, task = model.adapter_regularizer(), model(tokens, labels=tokens, return_dict=False)[0]
    assert regularizer > 0.1
    model(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    (task + regularizer).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name])

    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, **arguments), train_dataset=rows(tokens))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((task + regularizer).item(), abs=1e-3)

    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(tokens, labels=tokens).loss, llama()(tokens, labels=tokens).loss)
    model.eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(frozen(tokens, labels=tokens).loss, frozen(tokens, labels=tokens, return_dict=False)[0])


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


def test_a_prepared_model_is_frozen_in_float32_and_checkpoints() -> None:
    for quantised in (True, False):
        model: Any = llama().bfloat16()
        model = prepare_model_for_kbit_training(with_one_nf4_layer(model) if quantised else model)
        assert not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == ({torch.float32, torch.uint8} if quantised else {torch.float32})
        assert model.is_activation_checkpointing is quantised  # as in HF PEFT
        assert model.get_input_embeddings()(torch.tensor([1])).requires_grad is quantised


def test_the_embeddings_output_requires_grad_for_checkpointing() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad
    assert model.prepare_model_for_gradient_checkpointing(model) is model
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
