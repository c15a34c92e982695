"""The reference of an objective: a copy of the start, the base, or a frozen adapter, on the same base weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_answers import answers, trainer
from tiny_pairs import adapted

from peftcore import TrainingError

IDS = torch.tensor([[3, 7, 9, 4]])


@pytest.mark.parametrize("reference", ["start", "base"])
def test_the_reference_stands_still_while_the_model_changes(tmp_path: Path, reference: Any) -> None:
    model = adapted().eval()
    with torch.no_grad():
        start = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
    objective = trainer(model, tmp_path, answers(4), reference=reference).training_objective
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.train()
    with objective.reference_in_effect(model) as reference_model:
        logits = reference_model(IDS).logits
    assert not logits.requires_grad and model.training
    torch.testing.assert_close(logits, start if reference == "start" else base)
    assert not torch.allclose(model.eval()(IDS).logits, start)


def test_a_copy_of_the_start_shares_the_base_weights(tmp_path: Path) -> None:
    model = adapted()
    start = trainer(model, tmp_path, answers(4), reference="start").training_objective.start_model
    ours, copied = (
        {parameter.data_ptr() for parameter in each.parameters()} for each in (model.base_model, start.base_model)
    )
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    assert ours - copied == trained and not any(parameter.requires_grad for parameter in start.parameters())


def test_a_trained_or_unknown_reference_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the reference adapter 'default' is trained"):
        trainer(adapted(), tmp_path, answers(2), ref_adapter_name="default")
    with pytest.raises(Exception, match="champion"):
        trainer(adapted(), tmp_path, answers(2), ref_adapter_name="champion")


@pytest.mark.parametrize("reference", ["start", "base"])
def test_mixed_precision_computes_the_reference_as_it_computes_the_model(tmp_path: Path, reference: Any) -> None:
    model = adapted().eval()
    objective = trainer(model, tmp_path, answers(4), reference=reference, bf16=True).training_objective
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        start = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
    with objective.reference_in_effect(model) as reference_model:
        assert torch.equal(reference_model(IDS).logits, start if reference == "start" else base)
