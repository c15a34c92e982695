"""TRL's trainers on models that are adapted already, and what they cannot do with them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import Nursery
from quiet_training import losses, trained
from safetensors.torch import load_file
from tiny_training import adapted
from transformers import LlamaForCausalLM, Trainer

pytest.importorskip("trl")
from trl_runs import (
    AdapterDPOTrainer,
    AdapterGRPOTrainer,
    AdapterKTOTrainer,
    AdapterRLOOTrainer,
    AdapterSFTTrainer,
    DPOTrainer,
    KTOTrainer,
    SFTTrainer,
    by_rewards,
    dpo,
    kto,
    sft,
)

from peftcore import LoraConfig, PeftModel, TrainingError, get_peft_model
from peftcore.train import reference_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's of itself


def with_head(model: Any) -> Any:
    return get_peft_model(model.unload(), LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in trained(model).items() if not torch.equal(p, before[name])}


# -- SFT -------------------------------------------------------------------------------------------------------------


def test_sft_trains_and_saves_the_adapter_alone_as_the_mixin_over_it_does(tmp_path: Path) -> None:
    made = {}
    for name, made_by in (("plain", SFTTrainer), ("mixin", AdapterSFTTrainer)):
        model = adapted()
        before = trained(model)
        made[name] = sft(model, tmp_path / name, made_by)
        made[name].train()
        assert moved(model, before) == before.keys()
        made[name].save_model(str(tmp_path / name / "saved"))
        saved = tmp_path / name / "saved"
        assert not (saved / "model.safetensors").exists()
        again = PeftModel.from_pretrained(adapted().unload(), saved, is_trainable=True)
        for path, parameter in trained(again).items():
            assert torch.equal(parameter, trained(model)[path])
    assert losses(made["plain"]) == pytest.approx(losses(made["mixin"]), rel=1e-6)


def test_with_the_mixin_sft_resumes_exactly(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    straight = sft(adapted(dropout=0.2), tmp_path, AdapterSFTTrainer, **saving)
    straight.train()
    resumed = sft(adapted(dropout=0.2), tmp_path, AdapterSFTTrainer, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(straight)
    for path, parameter in trained(resumed.model).items():
        assert torch.equal(parameter, trained(straight.model)[path])


def test_the_mixin_leaves_an_objective_of_sfts_own_to_it(tmp_path: Path) -> None:
    """DFT weighs a token's loss by its probability. arXiv:2508.05629"""
    plain, mixed = (
        sft(adapted(), tmp_path / made.__name__, made, loss_type="dft") for made in (SFTTrainer, AdapterSFTTrainer)
    )
    plain.train()
    mixed.train()
    assert losses(mixed) == pytest.approx(losses(plain), rel=1e-6)
    assert mixed.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    usual = sft(adapted(), tmp_path / "usual", AdapterSFTTrainer)
    usual.train()
    assert losses(usual)[0] > 2 * losses(plain)[0]


@pytest.mark.parametrize(("made_by", "learns"), [(SFTTrainer, False), (AdapterSFTTrainer, True)])
def test_an_adapter_of_the_output_head_learns_with_the_mixin_only(
    tmp_path: Path, made_by: type[Trainer], learns: bool
) -> None:
    """TRL multiplies by the head's base weight itself; for HF PEFT's layers it refuses, ours it does not know."""
    model = with_head(adapted())
    before = trained(model)
    sft(model, tmp_path, made_by).train()
    assert ("lm_head.adapters.default.lora_B" in moved(model, before)) == learns


def test_a_configuration_of_ours_is_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig`"):
        sft(adapted().unload(), tmp_path, peft_config=LoraConfig(r=4))


def test_without_hf_peft_installed_trl_trains_the_same(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(tmp_path / "none", "trl") == 0
    made = sft(adapted(), tmp_path / "here")
    made.train()
    made.save_model(str(tmp_path / "here" / "saved"))
    here = load_file(tmp_path / "here" / "saved" / "adapter_model.safetensors")
    for way in ("plain", "mixin"):
        there = load_file(tmp_path / "none" / way / "saved" / "adapter_model.safetensors")
        for name, tensor in here.items():
            torch.testing.assert_close(there[name], tensor, rtol=1e-4, atol=1e-5)


# -- DPO -------------------------------------------------------------------------------------------------------------


def test_dpo_takes_the_base_as_reference_in_three_ways(tmp_path: Path) -> None:
    """Given: `reference_model`. Precomputed: of the model as it starts, where LoRA is still the base. Loaded: by
    default TRL loads the base once more from where it came from."""
    adapted().unload().save_pretrained(tmp_path / "base")
    found = {}
    for way in ("given", "precomputed", "loaded"):
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        before = trained(model)
        given = reference_model(model) if way == "given" else None
        made = dpo(model, tmp_path / way, given, precompute_ref_log_probs=way == "precomputed")
        assert (made.ref_model is None) == (way == "precomputed")
        made.train()
        assert moved(model, before) == before.keys()
        found[way] = losses(made)
        made.save_model(str(tmp_path / way / "saved"))
        assert not (tmp_path / way / "saved" / "model.safetensors").exists()
        saved = PeftModel.from_pretrained(adapted().unload(), tmp_path / way / "saved", is_trainable=True)
        assert not moved(saved, trained(model))
    assert found["given"][0] == pytest.approx(math.log(2), rel=1e-6)  # policy and reference agree at the start
    assert found["given"][-1] < 0.68
    for way in ("precomputed", "loaded"):
        assert found[way] == pytest.approx(found["given"], rel=1e-6)


def test_dpo_cannot_make_a_reference_of_a_base_that_came_from_nowhere_and_the_mixin_can(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        dpo(adapted(), tmp_path)
    assert isinstance(dpo(adapted(), tmp_path, made_by=AdapterDPOTrainer).ref_model, PeftModel)


def test_with_the_mixin_dpo_trains_and_evaluates_as_it_does_alone(tmp_path: Path) -> None:
    found = []
    for made_by in (DPOTrainer, AdapterDPOTrainer):
        model = adapted()
        made = dpo(model, tmp_path / made_by.__name__, reference_model(model), made_by)
        made.train()
        found.append((losses(made), made.evaluate()["eval_loss"]))
    (plain, plain_eval), (mixed, mixed_eval) = found
    assert mixed == pytest.approx(plain, rel=1e-6)
    assert mixed_eval == pytest.approx(plain_eval, rel=1e-6)


# -- the reference of an adapter that is trained already ---------------------------------------------------------------


def trained_before(folder: Path, **options: Any) -> Any:
    """A model whose adapter is not at its start, on a base that TRL can load once more."""
    adapted().unload().save_pretrained(folder / "base")
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))


@pytest.mark.parametrize("made_by", [DPOTrainer, AdapterDPOTrainer])
@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=str)
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
