"""The reference is the same model with other adapters, and the model is afterwards as it was."""

from pathlib import Path

import pytest
import torch
from quiet_training import tiny_llama
from tiny_pairs import adapted, log_prob, pairs

from peftcore import AdapterNameError
from peftcore.train import PreferenceCollator, pair_log_probs, reference_acting


def test_a_pairs_log_probabilities_are_those_of_its_answers_alone() -> None:
    rows, model = pairs(4), adapted().double().eval()
    found = pair_log_probs(model, PreferenceCollator(0)(rows))
    for i, row in enumerate(rows):
        for side, values, tokens in (
            ("chosen", found.chosen, found.chosen_tokens),
            ("rejected", found.rejected, found.rejected_tokens),
        ):
            expected = log_prob(model, row[f"{side}_input_ids"], row[f"{side}_labels"])
            torch.testing.assert_close(values[i], expected, rtol=1e-10, atol=1e-10)
            assert tokens[i] == len(row[f"{side}_input_ids"]) - row["prompt_length"]


def test_without_an_adapter_the_reference_is_the_base() -> None:
    rows, base = pairs(3), tiny_llama().double().eval()
    model = adapted(lora_dropout=0.5).double().train()
    with reference_acting(model):
        found = pair_log_probs(model, PreferenceCollator(0)(rows))
        assert not model.training and not found.chosen.requires_grad
    expected = torch.stack([log_prob(base, row["chosen_input_ids"], row["chosen_labels"]) for row in rows])
    torch.testing.assert_close(found.chosen, expected, rtol=1e-10, atol=1e-10)


def test_a_named_adapter_is_the_reference_where_training_started_from_one(tmp_path: Path) -> None:
    model = adapted().double()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "start")
    batch = PreferenceCollator(0)(pairs(3))
    start = pair_log_probs(model.eval(), batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters.default.lora_B" in name:
                parameter.mul_(2)
    moved = pair_log_probs(model, batch)
    with reference_acting(model, "start"):
        reference = pair_log_probs(model, batch)
    torch.testing.assert_close(reference.chosen, start.chosen.detach())
    assert not torch.allclose(moved.chosen, start.chosen)


@pytest.mark.parametrize("adapter", [None, "other"])
def test_everything_is_as_before_afterwards(adapter: str | None) -> None:
    model = adapted(lora_dropout=0.5).train()
    model.add_adapter("other", model.peft_config["default"])
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), reference_acting(model, adapter):
        assert model.active_adapters == ["default" if adapter is None else adapter]
        _ = 1 / 0
    assert model.active_adapters == ["default"] and torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model.eval()(ids).logits, tiny_llama().eval()(ids).logits)


def test_an_unknown_reference_is_an_error_that_names_the_known() -> None:
    model = adapted()
    with (
        pytest.raises(AdapterNameError, match="no adapter named 'ref'; loaded: default"),
        reference_acting(model, "ref"),
    ):
        pass
    assert torch.is_grad_enabled()
