"""The reference of TRL's trainers is the model as it was when the trainer was made."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quiet_training import losses
from tiny_training import adapted
from transformers import LlamaForCausalLM
from trl_runs import (
    AdapterDPOTrainer,
    AdapterGRPOTrainer,
    AdapterKTOTrainer,
    AdapterRLOOTrainer,
    DPOTrainer,
    KTOTrainer,
    by_rewards,
    dpo,
    kto,
)

from peftcore import LoraConfig, PeftModel, TrainingError, get_peft_model
from peftcore.train import reference_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's of itself


def test_dpo_cannot_make_a_reference_of_a_base_that_came_from_nowhere_and_the_mixin_can(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        dpo(adapted(), tmp_path)
    assert isinstance(dpo(adapted(), tmp_path, made_by=AdapterDPOTrainer).ref_model, PeftModel)


def trained_before(folder: Path, **options: Any) -> Any:
    """A model whose adapter is not at its start, on a base that TRL can load once more."""
    adapted().unload().save_pretrained(folder / "base")
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))


@pytest.mark.parametrize(
    ("made_by", "options"),
    [
        (DPOTrainer, {"modules_to_save": ["lm_head"]}),
        (AdapterDPOTrainer, {}),
        (AdapterDPOTrainer, {"bias": "all"}),
        (AdapterDPOTrainer, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_dpo_starts_at_log_two_from_a_trained_adapter(tmp_path: Path, made_by: Any, options: dict[str, Any]) -> None:
    model = trained_before(tmp_path, **options)
    made = dpo(model, tmp_path, reference_model(model) if made_by is DPOTrainer else None, made_by)
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(made)[-1] < losses(made)[0]


@pytest.mark.parametrize("made_by", [KTOTrainer, AdapterKTOTrainer])
def test_kto_starts_at_one_half_from_a_trained_adapter(tmp_path: Path, made_by: Any) -> None:
    model = trained_before(tmp_path)
    made = kto(model, tmp_path, reference_model(model) if made_by is KTOTrainer else None, made_by)
    made.train()
    assert losses(made)[0] == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("made_by", [AdapterGRPOTrainer, AdapterRLOOTrainer])
def test_the_first_divergence_of_a_trained_adapter_is_none(tmp_path: Path, made_by: Any) -> None:
    made = by_rewards(trained_before(tmp_path), tmp_path, made_by)
    made.train()
    divergences = [record["kl"] for record in made.state.log_history if "kl" in record]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 1e-6


def test_a_reference_that_follows_the_model_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    model = trained_before(tmp_path)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}
    made = dpo(model, tmp_path, None, AdapterDPOTrainer, **options)
    before = {name: p.clone() for name, p in made.ref_model.named_parameters()}
    made.train()
    assert any(not torch.equal(p, before[name]) for name, p in made.ref_model.named_parameters())
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def test_a_reference_made_too_late_is_refused(tmp_path: Path) -> None:
    model = trained_before(tmp_path)
    dpo(model, tmp_path, reference_model(model))
    with pytest.raises(TrainingError, match="call reference_model before you make the trainer"):
        reference_model(model)
