"""Classifiers: the weighted cross entropy, its metrics, and heads that are saved and merged with the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import quiet_arguments, without_printing
from tiny_pairs import adapted as causal
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from peftcore import LoraConfig, PeftModel, TaskType, TrainingError, get_peft_model
from peftcore.train import ClassificationCollator, ClassificationTrainer, balanced_class_weights
from peftcore.train.classification import macro_f1

CLASSES = 3


def decoder() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=50, num_labels=CLASSES, pad_token_id=0, **sizes, **heads)
    )


def encoder() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=CLASSES, **sizes, **dropout))


def adapted(make: Any = decoder, start: bool = False) -> Any:
    """A LoRA with the usual start, or with one that has no factor of zero."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.SEQ_CLS, init_lora_weights=start)
    return get_peft_model(make(), config)


def rows(count: int, weights: list[float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose class is that of a token which occurs in them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(10, 50, (length,), generator=generator).tolist()
        label = number % CLASSES
        ids[int(torch.randint(length, (), generator=generator))] = 1 + label
        made.append({"input_ids": ids, "label": label})
    return made if weights is None else [row | {"weight": w} for row, w in zip(made, weights, strict=True)]


def trainer(model: Any, folder: Path, data: list[dict[str, Any]], **options: Any) -> ClassificationTrainer:
    steps: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    class_weights = options.pop("class_weights", None)
    made = ClassificationTrainer(
        model=model,
        args=quiet_arguments(folder, **({"learning_rate": 5e-5} | steps | options)),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(rows(10, seed=1)),
        data_collator=ClassificationCollator(0),
        class_weights=class_weights,
    )
    return without_printing(made)


def logits_alone(model: Any, data: list[dict[str, Any]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in data])


# -- the loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "accumulation", "class_weights"),
    [  # every two of the three choices meet
        (decoder, 1, None),
        (decoder, 4, [0.5, 2.0, 1.0]),
        (encoder, 4, None),
        (encoder, 1, [0.5, 2.0, 1.0]),
    ],
)
def test_a_step_is_the_weighted_mean_over_all_accumulated_texts(
    tmp_path: Path, make: Any, accumulation: int, class_weights: list[float] | None
) -> None:
    weights = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0]
    data, plain = rows(8, weights), adapted(make).double()
    labels = torch.tensor([row["label"] for row in data])
    weighed = torch.tensor(weights, dtype=torch.float64)
    if class_weights is not None:
        weighed = weighed * torch.tensor(class_weights, dtype=torch.float64)[labels]
    loss = (F.cross_entropy(logits_alone(plain, data), labels, reduction="none") * weighed).sum() / weighed.sum()
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
    batch = ClassificationCollator(0)(data)
    own = model(**{name: t for name, t in batch.items() if name != "weight"}).loss
    assert made.compute_loss(model, batch).item() == pytest.approx(own.item(), rel=1e-6)


def test_the_collators_padding_token_changes_nothing(tmp_path: Path) -> None:
    model, data = adapted().eval(), rows(4)
    assert model.config.pad_token_id == 0
    made = trainer(model, tmp_path, data)
    expected, loss = (made.compute_loss(model, ClassificationCollator(pad)(data)).item() for pad in (0, 3))
    assert loss == pytest.approx(expected, rel=1e-6)


def test_balanced_classes_weigh_alike() -> None:
    labels = [0, 0, 0, 1, 1, 3]
    weights = balanced_class_weights(labels, 4)
    assert [weights[c] * labels.count(c) for c in range(4)] == pytest.approx([1.5, 1.5, 0.0, 1.5])


# -- metrics ---------------------------------------------------------------------------------------------------


def test_macro_f1_is_the_mean_of_the_classes_harmonic_means() -> None:
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 4]), torch.tensor([0, 0, 1, 1, 2, 4])
    # class 0: precision 1, recall 2/3; class 1: 1/2, 1/2; class 2: never right; class 4: right; class 3: not there
    assert macro_f1(labels, predictions) == pytest.approx((0.8 + 0.5 + 0.0 + 1.0) / 4)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_metrics_are_of_the_whole_set_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model, data = adapted().double().eval(), rows(10, seed=1)
    metrics = trainer(model, tmp_path, rows(4), per_device_eval_batch_size=batch_size).evaluate()
    logits, labels = logits_alone(model, data), torch.tensor([row["label"] for row in data])
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert metrics["eval_macro_f1"] == pytest.approx(macro_f1(labels, logits.argmax(-1)))


def test_a_classifier_learns_what_can_be_learnt(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 24}
    made = trainer(adapted(start=True), tmp_path, rows(192), logging_steps=40, **options)
    made.train()
    assert made.evaluate()["eval_accuracy"] >= 0.9


# -- the head --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("make", [decoder, encoder])
def test_the_head_is_saved_with_the_adapter_in_pefts_format(tmp_path: Path, make: Any) -> None:
    import peft

    model = adapted(make)
    trainer(model, tmp_path / "run", rows(8), max_steps=2).train()
    model.save_pretrained(tmp_path / "ours")
    inputs = {name: t for name, t in ClassificationCollator(0)(rows(5, seed=2)).items() if name != "weight"}
    expected = model.eval()(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    torch.testing.assert_close(back(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_head(tmp_path: Path) -> None:
    model = adapted()
    trainer(model, tmp_path, rows(8), max_steps=2).train()
    inputs = {name: t for name, t in ClassificationCollator(0)(rows(5, seed=2)).items() if name != "weight"}
    expected = model.eval()(**inputs).logits
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel) and type(merged.score) is torch.nn.Linear
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_quantised_base_keeps_a_head_that_is_not_quantised_and_trains(tmp_path: Path) -> None:
    decoder().bfloat16().save_pretrained(tmp_path / "base")
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, quantization_config=storage
    )
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    before = model.score.current().weight.clone()
    trainer(model, tmp_path / "run", rows(8), max_steps=3, learning_rate=1e-2).train()
    assert before.dtype == torch.bfloat16 and not torch.equal(model.score.current().weight, before)
    assert type(model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_model_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"logits of shape \(4, 9?8?, 50\).*AutoModelForSequenceClassification"):
        trainer(causal(), tmp_path, rows(4)).train()


def test_as_many_class_weights_as_classes(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="class_weights has 2 values, but the model has 3 classes"):
        trainer(adapted(), tmp_path, rows(4), class_weights=[1.0, 2.0])
