"""Token classifiers: the weighted cross entropy, its metrics, and heads that are saved and merged with the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import quiet_arguments, without_printing
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
)

from peftcore import LoraConfig, PeftModel, PromptTuningConfig, TaskType, TrainingError, get_peft_model
from peftcore.train import TokenClassificationCollator, TokenClassificationTrainer, entity_counts, summed_counts

TAGS = ["O", "B-X", "I-X"]
CLASSES = len(TAGS)


def decoder() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForTokenClassification(
        LlamaConfig(vocab_size=50, num_labels=CLASSES, pad_token_id=0, classifier_dropout=0.0, **sizes, **heads)
    )


def _bert() -> BertConfig:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(vocab_size=50, num_labels=CLASSES, **sizes, **dropout)


def encoder() -> Any:
    return BertForTokenClassification(_bert())


def classifier() -> Any:
    return BertForSequenceClassification(_bert())


def adapted(make: Any = decoder, start: bool = False) -> Any:
    """A LoRA with the usual start, or with one that has no factor of zero."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.TOKEN_CLS, init_lora_weights=start)
    return get_peft_model(make(), config)


def rows(count: int, weights: list[float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Tokens whose class is that of the token itself; every third token has no label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100 if i % 3 == 2 else n % CLASSES for i, n in enumerate(ids)]})
    return made if weights is None else [row | {"weight": w} for row, w in zip(made, weights, strict=True)]


def trainer(model: Any, folder: Path, data: list[dict[str, Any]], **options: Any) -> TokenClassificationTrainer:
    steps: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    own = {name: options.pop(name) for name in ("class_weights", "tags", "scheme") if name in options}
    made = TokenClassificationTrainer(
        model=model,
        args=quiet_arguments(folder, **({"learning_rate": 5e-5} | steps | options)),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(rows(10, seed=1)),
        data_collator=TokenClassificationCollator(0),
        **own,
    )
    return without_printing(made)


def alone(model: Any, data: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The logits and the labels of each row's labelled positions, each row by itself."""
    pairs = []
    for row in data:
        labels = torch.tensor(row["labels"])
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        pairs.append((logits[labels != -100], labels[labels != -100]))
    return pairs


# -- the loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "accumulation", "class_weights"),
    [(decoder, 1, None), (decoder, 4, [0.5, 2.0, 1.0]), (encoder, 4, None), (encoder, 1, [0.5, 2.0, 0.0])],
)
def test_a_step_is_the_weighted_mean_over_all_accumulated_words(
    tmp_path: Path, make: Any, accumulation: int, class_weights: list[float] | None
) -> None:
    weights = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0]
    data, plain = rows(8, weights), adapted(make).double()
    of_class = torch.tensor(class_weights or [1.0] * CLASSES, dtype=torch.float64)
    total, items = torch.zeros((), dtype=torch.float64), 0.0
    for weight, (logits, labels) in zip(weights, alone(plain, data), strict=True):
        of_word = weight * of_class[labels]
        total = total + (F.cross_entropy(logits, labels, reduction="none") * of_word).sum()
        items += of_word.sum().item()
    loss = total / items
    loss.backward()
    model = adapted(make).double()
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    sgd: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    made = trainer(model, tmp_path, data, class_weights=class_weights, **options, **sgd)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    mine = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter - parameter.grad, rtol=1e-6, atol=1e-8)


def test_without_weights_the_loss_is_the_models_own(tmp_path: Path) -> None:
    model, data = adapted().eval(), rows(4)
    made = trainer(model, tmp_path, data)
    batch = TokenClassificationCollator(0)(data)
    own = model(**{name: t for name, t in batch.items() if name != "weight"}).loss
    assert made.compute_loss(model, batch).item() == pytest.approx(own.item(), rel=1e-6)


@pytest.mark.parametrize("make", [decoder, encoder])
def test_words_behind_a_prompt_have_the_models_own_loss(tmp_path: Path, make: Any) -> None:
    prompt = PromptTuningConfig(task_type=TaskType.TOKEN_CLS, num_virtual_tokens=3)
    model = get_peft_model(make(), prompt).double().eval()
    made = trainer(model, tmp_path, rows(4))
    batch = TokenClassificationCollator(0)(rows(1))
    own = model(**{name: value for name, value in batch.items() if name != "weight"}).loss
    assert made.compute_loss(model, batch).item() == pytest.approx(own.item(), rel=1e-5)  # a decoder's is in float32


def test_a_row_without_a_label_has_no_part_in_the_loss(tmp_path: Path) -> None:
    model = adapted(start=True).double().eval()
    data = [*rows(3), {"input_ids": [4, 5], "labels": [-100, -100]}]
    made, batch = trainer(model, tmp_path, data), TokenClassificationCollator(0)
    assert made.compute_loss(model, batch(data)).item() == pytest.approx(
        made.compute_loss(model, batch(data[:3])).item(), rel=1e-9
    )


# -- metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_metrics_are_of_the_whole_set_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model, data = adapted(start=True).double().eval(), rows(10, seed=1)
    metrics = trainer(model, tmp_path, rows(4), per_device_eval_batch_size=batch_size, tags=TAGS).evaluate()
    pairs = alone(model, data)
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    named = [[[TAGS[i] for i in one] for one in (y.tolist(), z.argmax(-1).tolist())] for z, y in pairs]
    counts = summed_counts(entity_counts(*row) for row in named)
    assert 0 < counts.f1 < 1 and metrics["eval_entity_f1"] == pytest.approx(counts.f1)


def test_without_tags_there_is_no_entity_f1(tmp_path: Path) -> None:
    assert "eval_entity_f1" not in trainer(adapted(), tmp_path, rows(4)).evaluate()


def test_a_tagger_learns_what_can_be_learnt(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 24}
    made = trainer(adapted(start=True), tmp_path, rows(192), logging_steps=40, tags=TAGS, **options)
    made.train()
    metrics = made.evaluate()
    assert metrics["eval_accuracy"] >= 0.9 and metrics["eval_entity_f1"] >= 0.8


# -- the head --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("make", [decoder, encoder])
def test_the_head_is_saved_with_the_adapter_in_pefts_format(tmp_path: Path, make: Any) -> None:
    import peft

    model = adapted(make)
    trainer(model, tmp_path / "run", rows(8), max_steps=2).train()
    model.save_pretrained(tmp_path / "ours")
    batch = TokenClassificationCollator(0)(rows(5, seed=2))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.eval()(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    torch.testing.assert_close(back(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_model_without_a_tag_for_each_position_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"logits of shape \(4, 3\) for labels.*AutoModelForTokenClassification"):
        trainer(adapted(classifier), tmp_path, rows(4)).train()


def test_the_collator_of_texts_is_refused(tmp_path: Path) -> None:
    from peftcore.train import RightPaddingCollator

    made = trainer(adapted(), tmp_path, rows(4))
    made.data_collator = RightPaddingCollator(0)
    with pytest.raises(TrainingError, match="give data_collator=TokenClassificationCollator"):
        made.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 values, but the model has 3 classes"),
        ({"tags": ["O", "B-X"]}, "tags has 2 values, but the model has 3 classes"),
        ({"tags": ["O", "B-X", "NAME"]}, "NAME is not O, B-TYPE or I-TYPE; give scheme='plain'"),
    ],
)
def test_weights_and_tags_fit_the_classes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer(adapted(), tmp_path, rows(4), **options)
