import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from datasets import Dataset
from quiet_training import VOCABULARY, DieAt, Stop, assert_same, losses, trained
from safetensors.torch import load_file
from tiny_training import adapted, rows
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, TrainingError, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator

pytestmark = pytest.mark.filterwarnings(
    # the deprecation is inside transformers' own scheduler set-up
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)


def trainer(model: Any, folder: Path, data: Dataset | None = None, **options: Any) -> AdapterTrainer:
    """Eight steps of four rows of like length."""
    grouped = {"train_sampling_strategy": "group_by_length", "logging_nan_inf_filter": True}
    return tiny_training.trainer(model, folder, rows(16) if data is None else data, **(grouped | options))


# -- loss ------------------------------------------------------------------------------------------------------


def test_accumulated_small_batches_train_like_one_big_batch(tmp_path: Path) -> None:
    # rows differ in supervised tokens, so a mean of the parts' means would be another number
    whole, parts = adapted().double(), adapted().double()
    big = trainer(whole, tmp_path / "a", rows(8), per_device_train_batch_size=8, max_steps=3)
    small = trainer(
        parts,
        tmp_path / "b",
        rows(8),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
    )
    big.train()
    small.train()
    assert losses(big) == pytest.approx(losses(small), abs=1e-4)  # the log rounds to float32
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(tensor, trained(parts)[name], rtol=1e-6, atol=1e-8)


def test_the_first_loss_is_the_mean_over_the_batchs_supervised_tokens(tmp_path: Path) -> None:
    model = adapted()
    data = rows(4)
    batch = RightPaddingCollator(0)(list(data))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.reshape(-1, VOCABULARY), batch["labels"][:, 1:].reshape(-1))
    made = trainer(model, tmp_path, data, max_steps=1)
    made.train()
    assert losses(made)[0] == pytest.approx(expected.item(), abs=1e-5)


def test_label_smoothing_falls_back_to_trainers_loss(tmp_path: Path) -> None:
    plain = trainer(adapted(), tmp_path, max_steps=1)
    smooth = trainer(adapted(), tmp_path, max_steps=1, label_smoothing_factor=0.2)
    plain.train()
    smooth.train()
    assert losses(plain) != losses(smooth)


def test_a_loss_that_is_not_finite_stops_before_a_step(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    before = trained(model)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1 .*lower the learning rate"):
        trainer(model, tmp_path).train()
    assert_same(trained(model), before)


# -- steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_allocator_runs_once_a_step_with_gradients_there(tmp_path: Path, accumulation: int) -> None:
    model = adapted("adalora")
    seen: list[tuple[int, bool, bool]] = []
    before = trained(model)

    def record(step: int, optimizer: Any) -> None:
        gradients = all(p.grad is not None for p in model.parameters() if p.requires_grad)
        moved = any(not torch.equal(tensor, before[name]) for name, tensor in trained(model).items())
        seen.append((step, gradients, moved))

    model.on_optimizer_step = record
    trainer(model, tmp_path, gradient_accumulation_steps=accumulation, max_steps=4).train()
    assert seen == [(step, True, True) for step in (1, 2, 3, 4)]


def test_rank_falls_to_its_target(tmp_path: Path) -> None:
    model = adapted("adalora")
    trainer(model, tmp_path).train()
    left = sum(p.numel() for name, p in model.named_parameters() if name.endswith("lora_E_weight"))
    layers = sum(1 for name, _ in model.named_parameters() if name.endswith("lora_E_weight"))
    assert left == 2 * layers


def test_checkpointed_activations_give_the_same_training(tmp_path: Path) -> None:
    plain, saving = adapted(), adapted()
    trainer(plain, tmp_path / "a", max_steps=3).train()
    trainer(saving, tmp_path / "b", max_steps=3, activation_checkpointing=True).train()
    assert_same(trained(plain), trained(saving))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model: model.unload(), "without adapters; call get_peft_model"),
        (lambda model: model.set_requires_grad("default", False) or model, "nothing to train"),
    ],
)
def test_a_model_that_cannot_train_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer(break_it(adapted()), tmp_path)


# -- quantised bases -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def four_bit(folder: Path) -> Any:
    torch.manual_seed(0)
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=storage)


def test_evaluating_does_not_change_how_a_4_bit_base_trains(tmp_path: Path, small_base: Path) -> None:
    results = []
    for name, evaluations in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1})):
        model = get_peft_model(four_bit(small_base), LoraConfig(r=4, target_modules="all-linear"))
        trainer(model, tmp_path / name, rows(8), max_steps=2, **evaluations).train()
        results.append(trained(model))
    assert_same(*results)


def test_a_4_bit_base_that_is_packed_for_inference_is_refused(tmp_path: Path, small_base: Path) -> None:
    model = four_bit(small_base).eval()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # what an eval forward sets on a CPU with bf16 kernels
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(TrainingError, match=r"q_proj: a forward .* has packed this 4-bit.*load the base model again"):
        trainer(model, tmp_path)


# -- checkpoints -----------------------------------------------------------------------------------------------


SAVING: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


EACH_STEP: dict[str, Any] = {**SAVING, "gradient_accumulation_steps": 1, "load_best_model_at_end": False}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], AdapterTrainer]:
    """`straight("lora")`: an uninterrupted run of eight steps, five of them an epoch, with a checkpoint after each."""

    @cache
    def run(method: str) -> AdapterTrainer:
        made = trainer(adapted(method, dropout=0.2), tmp_path_factory.mktemp(method), rows(20), **EACH_STEP)
        made.train()
        return made

    return run


# inside the first and the second epoch; AdaLoRA is pruned from 6 on
@pytest.mark.parametrize(("method", "stop"), [("lora", 3), ("lora", 7), ("adalora", 3), ("adalora", 6), ("adalora", 7)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, straight: Callable[[str], AdapterTrainer], method: str, stop: int
) -> None:
    whole = straight(method)
    torch.rand(11)  # another process has drawn other numbers
    resumed = trainer(adapted(method, dropout=0.2), tmp_path, rows(20), **EACH_STEP)
    resumed.train(resume_from_checkpoint=str(Path(str(whole.args.output_dir)) / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 8
    assert losses(resumed) == losses(whole)
    assert_same(trained(resumed.model), trained(whole.model))
    assert_same(resumed.model.adapter_state(), whole.model.adapter_state())


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**SAVING, "max_steps": 4}
    with pytest.raises(Stop):
        trainer(adapted(), tmp_path, callbacks=[DieAt(2)], **options).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    made = trainer(adapted(), tmp_path, **options)
    with caplog.at_level(logging.WARNING):
        made.train(resume_from_checkpoint=True)
    assert "optimizer.pt" in caplog.text
    assert made.state.global_step == 4


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        trainer(adapted(), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.05), ("adalora", 0.2)])
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path, method: str, rate: float) -> None:
    model = adapted(method)
    # random labels: at these rates the model soon fits the training rows and gets worse on the others
    made = trainer(model, tmp_path, **SAVING, save_total_limit=2, learning_rate=rate)
    made.train()
    losses = {r["step"]: r["eval_loss"] for r in made.state.log_history if "eval_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    assert made.state.best_global_step == best < 8
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    if method == "lora":
        saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
        model.save_pretrained(tmp_path / "final")
        assert_same(load_file(tmp_path / "final" / "adapter_model.safetensors"), saved)


def test_old_checkpoints_go_once_a_new_one_counts(tmp_path: Path) -> None:
    options = {**SAVING, "load_best_model_at_end": False, "save_total_limit": 2, "max_steps": 4}
    trainer(adapted(), tmp_path, **options).train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    best = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_global_step"]
    assert left == sorted({"checkpoint-4", f"checkpoint-{best}"} if best != 4 else {"checkpoint-3", "checkpoint-4"})


def test_a_finished_run_can_be_taken_over_from_its_last_checkpoint(tmp_path: Path) -> None:
    options = {**SAVING, "max_steps": 2}
    first = trainer(adapted(), tmp_path, **options)
    first.train()
    again = trainer(adapted(), tmp_path, **options)
    again.finish_from(tmp_path / "checkpoint-2")
    assert again.state.best_metric == first.state.best_metric
    assert_same(trained(again.model), trained(first.model))
