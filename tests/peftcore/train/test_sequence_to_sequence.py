"""Encoder-decoders: the weighted cross entropy of targets, LoRA in PEFT's format, and models that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import quiet_arguments, without_printing
from tiny_pairs import adapted as causal
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peftcore import LoraConfig, PeftModel, TaskType, TrainingError, get_peft_model
from peftcore.train import RightPaddingCollator, SequenceToSequenceCollator, SequenceToSequenceTrainer


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def bart() -> Any:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 32 if name == "ffn_dim" else 2 for side in ("encoder", "decoder")
             for name in ("layers", "attention_heads", "ffn_dim")}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=32, dropout=0.0, **sides, **tokens))


def adapted(make: Any = t5, start: bool = False) -> Any:
    """A LoRA with the usual start, or with one that has no factor of zero."""
    targets = ["q", "v"] if make is t5 else ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type=TaskType.SEQ_2_SEQ_LM, init_lora_weights=start)
    return get_peft_model(make(), config)


def rows(count: int, weights: list[float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Sources of several lengths, whose target is their first token and the end."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(5, 50, (3 + number % 5,), generator=generator).tolist()
        made.append({"input_ids": [*ids, 1], "labels": [*ids[: 1 + number % 2], 1]})
    return made if weights is None else [row | {"weight": w} for row, w in zip(made, weights, strict=True)]


def trainer(model: Any, folder: Path, data: list[dict[str, Any]], **options: Any) -> SequenceToSequenceTrainer:
    steps: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    made = SequenceToSequenceTrainer(
        model=model,
        args=quiet_arguments(folder, **({"learning_rate": 5e-5} | steps | options)),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(rows(10, seed=1)),
        data_collator=SequenceToSequenceCollator(0),
    )
    return without_printing(made)


def summed_losses(model: Any, data: list[dict[str, Any]]) -> torch.Tensor:
    """The summed loss of each row's target, each row by itself and without padding."""
    sums = []
    for row in data:
        labels = torch.tensor([row["labels"]])
        logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
        sums.append(F.cross_entropy(logits[0], labels[0], reduction="sum"))
    return torch.stack(sums)


@pytest.mark.parametrize(("make", "accumulation"), [(t5, 1), (t5, 4), (bart, 2)])
def test_a_step_is_the_weighted_mean_over_all_accumulated_target_tokens(
    tmp_path: Path, make: Any, accumulation: int
) -> None:
    weights = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0]
    data, plain = rows(8, weights), adapted(make).double()
    weighed = torch.tensor(weights, dtype=torch.float64)
    tokens = torch.tensor([len(row["labels"]) for row in data])
    loss = (summed_losses(plain, data) * weighed).sum() / (weighed * tokens).sum()
    loss.backward()
    model = adapted(make).double()
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    sgd: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    made = trainer(model, tmp_path, data, **options, **sgd)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    mine = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter - parameter.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_the_evaluation_is_of_the_whole_set_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model, data = adapted(start=True).double().eval(), rows(10, seed=1)
    metrics = trainer(model, tmp_path, rows(4), per_device_eval_batch_size=batch_size).evaluate()
    expected = summed_losses(model, data).sum() / sum(len(row["labels"]) for row in data)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_without_weights_the_loss_is_the_models_own(tmp_path: Path) -> None:
    model, data = adapted().eval(), rows(4)
    made, batch = trainer(model, tmp_path, data), SequenceToSequenceCollator(0)(data)
    own = model(**{name: t for name, t in batch.items() if name != "weight"}).loss
    assert made.compute_loss(model, batch).item() == pytest.approx(own.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_the_adapter_is_pefts_and_merges(tmp_path: Path) -> None:
    import peft

    model = adapted()
    trainer(model, tmp_path / "run", rows(8), max_steps=2, learning_rate=1e-2).train()
    model.save_pretrained(tmp_path / "ours")
    batch = SequenceToSequenceCollator(0)(rows(5, seed=2))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = model.eval()(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(t5(), str(tmp_path / "ours")).eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    back = PeftModel.from_pretrained(t5(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no encoder and decoder; load AutoModelForSeq2SeqLM"):
        trainer(causal(), tmp_path, rows(4)).train()


def test_the_collator_of_texts_is_refused(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path, [{"input_ids": [5, 6, 1], "labels": [5, 6, 1]}] * 4)
    made.data_collator = RightPaddingCollator(0)
    with pytest.raises(TrainingError, match="give data_collator=SequenceToSequenceCollator"):
        made.train()
