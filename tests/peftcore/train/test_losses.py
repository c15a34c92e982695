from collections.abc import Callable

import pytest
import torch
from quiet_training import VOCABULARY, tiny_llama
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from peftcore.train.losses import row_sums, supervised_positions, token_losses
from peftcore.train.model_loss import has_causal_loss


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def batch(supervised: float = 0.3, rows: int = 3, width: int = 12) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Right-padded rows of different lengths, of which some tokens are supervised."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, width), generator=generator)
    attention = torch.ones_like(ids)
    for row in range(rows):
        attention[row, width - 2 * row :] = 0
    supervision = torch.rand(rows, width, generator=generator) < supervised
    return {"input_ids": ids, "attention_mask": attention}, ids.where(supervision & attention.bool(), -100)


def full_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=-100)


def test_a_position_is_supervised_when_the_next_token_is_labelled() -> None:
    labels = torch.tensor([[5, -100, 7, -100, -100], [-100, -100, -100, 3, 4]])
    expected = [[False, True, False, False, False], [False, False, True, True, False]]
    assert supervised_positions(labels).tolist() == expected


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_loss_and_gradient_are_those_of_the_full_loss(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    inputs, labels = batch()
    expected = full_loss(model, inputs, labels)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    values, mask = token_losses(model, inputs, labels)
    values.mean().backward()
    assert len(values) == int((labels[:, 1:] != -100).sum()) == int(mask.sum())
    torch.testing.assert_close(values.mean(), expected, rtol=1e-12, atol=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_loss_is_the_models_own_in_float32() -> None:
    torch.manual_seed(0)
    model = tiny_llama().eval()
    inputs, labels = batch()
    values, _ = token_losses(model, inputs, labels)
    torch.testing.assert_close(values.mean(), model(**inputs, labels=labels).loss)


def test_half_precision_logits_are_widened() -> None:
    model = tiny_llama().bfloat16().eval()
    values, _ = token_losses(model, *batch())
    assert values.dtype == torch.float32


def test_a_batch_without_supervision_has_a_zero_loss_and_gradients_of_zero() -> None:
    model = tiny_llama()
    inputs, labels = batch(supervised=0.0)
    values, mask = token_losses(model, inputs, labels)
    values.sum().backward()
    assert not len(values) and not mask.any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_row_sums_add_up_each_row() -> None:
    model = tiny_llama().double().eval()
    inputs, labels = batch()
    labels[1] = -100
    values, mask = token_losses(model, inputs, labels)
    sums, tokens = row_sums(values, mask)
    assert tokens.tolist() == (labels[:, 1:] != -100).sum(1).tolist()
    assert sums[1] == 0
    for row in (0, 2):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected = full_loss(model, alone, labels[row : row + 1])
        torch.testing.assert_close(sums[row] / tokens[row], expected, rtol=1e-9, atol=1e-9)


def test_only_next_token_losses_are_taken_for_causal() -> None:
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    assert has_causal_loss(tiny_llama()) and has_causal_loss(gpt2())
    assert not has_causal_loss(bert) and not has_causal_loss(torch.nn.Linear(2, 2))


def test_a_decoder_that_takes_shifted_labels_has_another_loss() -> None:
    # Bart's decoder inherits the same `loss_function` and does not call it
    bart = BartForCausalLM(
        BartConfig(vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    )
    inputs, labels = batch(supervised=1.0, rows=1)
    values, _ = token_losses(bart.eval(), inputs, labels)
    assert not torch.isclose(bart(**inputs, labels=labels).loss, values.mean(), rtol=1e-3)
    assert not has_causal_loss(bart)


def test_a_loss_that_also_balances_experts_is_another() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    options = sizes | {"vocab_size": VOCABULARY, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert has_causal_loss(MixtralForCausalLM(MixtralConfig(**options)))
    assert not has_causal_loss(MixtralForCausalLM(MixtralConfig(**options, output_router_logits=True)))


def test_a_class_with_its_own_loss_is_not_taken_for_its_parents() -> None:
    class Calls(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Replaces(LlamaForCausalLM):
        def forward(self, input_ids, labels=None):  # type: ignore[override]
            return self.model(input_ids).last_hidden_state.square().mean()

    config = tiny_llama().config
    assert has_causal_loss(Calls(config)) and not has_causal_loss(Replaces(config))
