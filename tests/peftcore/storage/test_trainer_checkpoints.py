"""Plain `transformers.Trainer` resumes and ends with the best checkpoint for models with adapters, as for others."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from quiet_training import assert_same, losses, tiny_llama, trained
from safetensors.torch import load_file
from tiny_training import SAVING, adapted, plain
from transformers import LlamaForCausalLM, Trainer

from peftcore import CheckpointError, LoraConfig, PeftModel, get_peft_model
from peftcore.storage.trainer_checkpoints import teach_trainer


def test_trainer_ends_with_the_best_adapter(tmp_path: Path) -> None:
    """The scores are made up, so that the best checkpoint is not the last."""
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    scored = SAVING | {"metric_for_best_model": "score", "greater_is_better": True}
    made = plain(model, tmp_path, **scored, load_best_model_at_end=True)
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.0])
    made.compute_metrics = lambda predictions: {"score": next(scores)}
    made.train()
    best = Path(str(made.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"
    saved = PeftModel.from_pretrained(adapted().unload(), best, is_trainable=True)
    assert_same(trained(saved), {name: p for name, p in trained(model).items() if ".second." not in name})
    [loss] = [r["eval_loss"] for r in made.state.log_history if r["step"] == 2 and "eval_loss" in r]
    assert made.evaluate()["eval_loss"] == pytest.approx(loss)


@pytest.mark.parametrize("late", [False, True])
def test_trainer_resumes_from_its_checkpoint_as_if_it_had_not_stopped(
    tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = plain(adapted(dropout=0.2), tmp_path, **(SAVING | {"eval_strategy": "no"}))
    straight.train()
    if late:  # what a script does that imports Trainer after it has made its model
        monkeypatch.delitem(sys.modules, "transformers.trainer")
    model = adapted(dropout=0.2)
    monkeypatch.undo()
    resumed = plain(model, tmp_path, **(SAVING | {"eval_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(straight)
    assert_same(trained(resumed.model), trained(straight.model))


def test_trainer_does_not_resume_what_it_has_not_saved(tmp_path: Path) -> None:
    model = adapted("adalora")
    plain(model, tmp_path, **SAVING).train()
    with pytest.raises(CheckpointError, match=r"default: this method has training state .* AdapterTrainer"):
        plain(adapted("adalora"), tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_trainer_treats_other_models_as_ever(tmp_path: Path) -> None:
    model = tiny_llama()
    adapted()  # which teaches it
    made = plain(model, tmp_path, **SAVING, load_best_model_at_end=True, greater_is_better=True)
    made.train()
    best = LlamaForCausalLM.from_pretrained(str(made.state.best_model_checkpoint))
    assert_same(dict(model.named_parameters()), dict(best.named_parameters()))
    resumed = plain(tiny_llama(), tmp_path, **(SAVING | {"max_steps": 5}))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


@pytest.mark.parametrize("copied", [False, True])
def test_a_trainer_that_is_imported_after_the_model_was_adapted_reads_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    plain(adapted(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    model = adapted()
    monkeypatch.setattr(transformers, "trainer", sys.modules["transformers.trainer"], raising=False)
    monkeypatch.delitem(sys.modules, "transformers.trainer")
    model = copy.deepcopy(model) if copied else get_peft_model(adapted().unload(), model.peft_config["default"])
    later = importlib.import_module("transformers.trainer").Trainer
    assert later is not Trainer
    plain(model, tmp_path / "again", later, max_steps=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert_same(model.get_adapter_state_dict(), {key.removeprefix("base_model.model."): t for key, t in saved.items()})


def test_adapting_more_models_wraps_trainers_methods_once() -> None:
    adapted()
    methods = (Trainer._load_best_model, Trainer._load_from_checkpoint)
    teach_trainer()
    adapted()
    assert (Trainer._load_best_model, Trainer._load_from_checkpoint) == methods
    assert not hasattr(methods[0].__wrapped__, "__wrapped__")  # type: ignore[attr-defined]


def test_a_checkpoint_of_several_adapters_restores_each(tmp_path: Path) -> None:
    """The first adapter's files lie in the checkpoint's folder, and another adapter's in a folder of its name."""

    def model() -> Any:
        made = adapted()
        made.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        made.set_adapter(["default", "second"])
        return made

    straight = plain(model(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    straight.train()
    resumed = plain(model(), tmp_path / "again", max_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert any(".second." in name for name in trained(resumed.model))
    assert_same(trained(resumed.model), trained(straight.model))
