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
    WITHOUT_ADAM,
    AdapterDPOTrainer,
    AdapterSFTTrainer,
    DPOTrainer,
    SFTTrainer,
    dpo,
    sft,
)

from peftcore import LoraConfig, PeftModel, get_peft_model
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
    assert ("lm_head.lora_B.default.weight" in moved(model, before)) == learns


def test_a_configuration_of_ours_is_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig`"):
        sft(adapted().unload(), tmp_path, peft_config=LoraConfig(r=4))


@pytest.mark.slow
def test_without_hf_peft_installed_trl_trains_the_same(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(tmp_path / "none", "trl") == 0
    made = sft(adapted(), tmp_path / "here", **WITHOUT_ADAM)
    made.train()
    made.save_model(str(tmp_path / "here" / "saved"))
    here = load_file(tmp_path / "here" / "saved" / "adapter_model.safetensors")
    assert max(tensor.abs().max() for name, tensor in here.items() if "lora_B" in name) > 0.01  # it started at zero
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
