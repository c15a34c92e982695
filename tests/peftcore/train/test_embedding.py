"""Training of text embeddings: the loss of a batch, its parts, evaluation over the whole set, and resumption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quiet_training import DieAt, Stop, assert_same, losses, quiet_arguments, trained, without_printing
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from peftcore import LoraConfig, PeftModel, PromptTuningConfig, TaskType, TrainingError, get_peft_model
from peftcore.train import Contrastive, EmbeddingCollator, EmbeddingTrainer, embed

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def encoder(dropout: float = 0.0) -> BertModel:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(vocab_size=60, **SIZES, **rates), add_pooling_layer=False)


def decoder() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES))


def adapted(base: Any) -> Any:
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(base, LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **options))


def rows(count: int, negatives: Callable[[int], int] = lambda _: 0) -> list[dict[str, Any]]:
    """Query n, 1 has the passage n, 2, 3; the negatives end differently."""
    return [
        {
            "query_input_ids": [2, 10 + n, 1],
            "positive_input_ids": [2, 10 + n, 3, 4],
            "negatives_input_ids": [[2, 10 + n, 5 + k] for k in range(negatives(n))],
        }
        for n in range(count)
    ]


def trainer(folder: Path, model: Any, dataset: Any, *callbacks: Any, **options: Any) -> EmbeddingTrainer:
    names = ("contrastive", "pooling", "normalize", "rows_at_once", "eval_dataset", "data_collator")
    own = {name: options.pop(name) for name in names if name in options}
    own.setdefault("data_collator", EmbeddingCollator(0))
    arguments = quiet_arguments(folder, **options)
    return without_printing(
        EmbeddingTrainer(model=model, args=arguments, train_dataset=dataset, callbacks=[*callbacks], **own)
    )


def text_vector(model: Any, ids: list[int], pooling: str) -> Tensor:
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return F.normalize({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling], dim=-1)


def loss_by_hand(model: Any, batch: list[dict[str, Any]], pooling: str, scale: float) -> Tensor:
    queries = torch.stack([text_vector(model, row["query_input_ids"], pooling) for row in batch])
    texts = [row["positive_input_ids"] for row in batch] + [ids for row in batch for ids in row["negatives_input_ids"]]
    passages = torch.stack([text_vector(model, ids, pooling) for ids in texts])
    return F.cross_entropy(scale * queries @ passages.T, torch.arange(len(batch)), reduction="none")


@pytest.mark.parametrize(("base", "pooling"), [(encoder, "mean"), (encoder, "cls"), (decoder, "last")])
def test_a_batch_has_the_loss_and_gradients_of_its_texts_one_by_one(
    tmp_path: Path, base: Callable[[], Any], pooling: Any
) -> None:
    model = adapted(base()).double()
    batch = rows(4, negatives=lambda n: n % 3)  # different numbers of negatives
    contrastive = Contrastive(scale=5.0)
    made = trainer(tmp_path, model, batch, pooling=pooling, contrastive=contrastive)
    inputs = made.data_collator(batch)
    loss = made.compute_loss(model, inputs)
    expected = loss_by_hand(model, batch, pooling, 5.0).mean()
    torch.testing.assert_close(loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sides = [torch.autograd.grad(each, parameters, allow_unused=True) for each in (loss, expected)]
    assert any(gradient is not None and gradient.any() for gradient in sides[0])
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("base", "pooling"), [(encoder, "mean"), (encoder, "cls"), (decoder, "last")])
def test_an_embedding_behind_a_prompt_is_that_of_the_text(base: Callable[[], Any], pooling: Any) -> None:
    prompt = PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=3)
    model = get_peft_model(base(), prompt).double().eval()
    ids, mask = torch.tensor([[2, 10, 3, 4], [2, 11, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    vectors = embed(model, ids, mask, pooling)
    for vector, row, length in zip(vectors, ids, mask.sum(1).tolist(), strict=True):
        text = model(input_ids=row[None, :length]).last_hidden_state[0, 3:]
        expected = {"mean": text.mean(0), "cls": text[0], "last": text[-1]}[pooling]
        torch.testing.assert_close(vector, F.normalize(expected, dim=-1))


def test_weights_count_rows_over_the_accumulated_batch(tmp_path: Path) -> None:
    model, weights = adapted(encoder()), [1.0, 0.0, 3.0, 0.5]
    data = [row | {"weight": weight} for row, weight in zip(rows(4), weights, strict=True)]
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    made = trainer(
        tmp_path, model, data, contrastive=Contrastive(scale=5.0), **options, train_sampling_strategy="sequential"
    )
    expected = torch.cat([loss_by_hand(model, data[start : start + 2], "mean", 5.0) for start in (0, 2)])
    expected = (expected * torch.tensor(weights)).sum() / sum(weights)
    made.train()
    assert losses(made)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_training_in_parts_has_the_steps_of_the_whole_batch_with_dropout_too(tmp_path: Path) -> None:
    weights = []
    for at_once in (None, 3):
        model = adapted(encoder(dropout=0.0))
        options: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 3, "rows_at_once": at_once}
        made = trainer(tmp_path, model, rows(8, lambda n: n % 2), **options)
        made.train()
        weights.append(trained(model))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    # the second embedding of a part draws the masks of the first, so the loss's gradients belong to its value
    model = adapted(encoder(dropout=0.3)).double()
    made = trainer(tmp_path, model, rows(4), rows_at_once=1)
    model.train()
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return made.training_objective.example_losses(model, made.data_collator(rows(4)))[0].mean()

    (gradient,) = torch.autograd.grad(loss(), [parameter])
    step = torch.zeros_like(parameter)
    step[0, 0] = 1e-6
    with torch.no_grad():
        parameter += step
        after = loss()
        parameter -= 2 * step
        slope = (after - loss()) / 2e-6
    torch.testing.assert_close(slope, gradient[0, 0], rtol=1e-4, atol=1e-9)


def test_a_batch_that_does_not_fit_keeps_its_negatives(tmp_path: Path) -> None:
    results = []
    for room in (None, 3):
        model = adapted(encoder())
        made = trainer(tmp_path, model, rows(8), per_device_train_batch_size=8, max_steps=2)
        if room is not None:
            layer = model.get_base_model().encoder.layer[0]
            layer.register_forward_pre_hook(_fails_above(room))
        made.train()
        results.append((losses(made), trained(model)))
        assert (made.splitter.rows_at_once is None) == (room is None)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, rtol=1e-3, atol=1e-5)


def _fails_above(room: int) -> Callable[..., None]:
    def hook(module: Any, arguments: Any) -> None:
        if len(arguments[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return hook


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_ranks_all_passages_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model, data = adapted(encoder()), rows(7, negatives=lambda n: n % 2)
    data.append(data[2] | {"positive_input_ids": [2, 50, 51]})  # a second right answer to a query
    contrastive = Contrastive(scale=5.0, mask_false_negatives=False)
    made = trainer(
        tmp_path, model, data, eval_dataset=data, contrastive=contrastive, per_device_eval_batch_size=batch_size,
        prediction_loss_only=True, data_collator=EmbeddingCollator(0, negatives=1),
    )  # fmt: skip
    metrics = made.evaluate()
    model.eval()
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(model, data, "mean", 5.0).mean().item(), rel=1e-5)
    vector = {tuple(ids): text_vector(model, list(ids), "mean") for row in data
              for ids in (row["query_input_ids"], row["positive_input_ids"], *row["negatives_input_ids"])}  # fmt: skip
    corpus = {tuple(ids) for row in data for ids in (row["positive_input_ids"], *row["negatives_input_ids"])}
    places = []
    for row in data:
        query, own = vector[tuple(row["query_input_ids"])], tuple(row["positive_input_ids"])
        right = {tuple(o["positive_input_ids"]) for o in data if o["query_input_ids"] == row["query_input_ids"]}
        score = query @ vector[own]
        places.append(1 + sum(bool(query @ vector[ids] >= score) for ids in corpus - right))
    assert metrics["eval_recall_at_1"] == pytest.approx(sum(place == 1 for place in places) / 8)
    assert metrics["eval_mrr_at_10"] == pytest.approx(sum(1 / place for place in places if place <= 10) / 8)


def test_training_brings_queries_to_their_passages(tmp_path: Path) -> None:
    model, data = adapted(encoder()), rows(24)
    made = trainer(
        tmp_path, model, data, eval_dataset=data, num_train_epochs=12, per_device_train_batch_size=8,
        prediction_loss_only=True,
    )  # fmt: skip
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_recall_at_1"] > before["eval_recall_at_1"] and after["eval_loss"] < before["eval_loss"] / 4
    records = [record for record in made.state.log_history if "accuracy" in record]
    assert records[-1]["accuracy"] > records[0]["accuracy"]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(encoder(), tmp_path / "adapter").eval()
    inputs = made.data_collator(data)
    ids, mask = inputs["input_ids"][:, 0], inputs["attention_mask"][:, 0]
    torch.testing.assert_close(embed(again, ids, mask), embed(model.eval(), ids, mask))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    data = rows(12, lambda n: n % 3)
    straight = trainer(tmp_path / "a", adapted(encoder(dropout=0.1)), data, **options)
    straight.train()
    stopped = trainer(tmp_path / "b", adapted(encoder(dropout=0.1)), data, DieAt(5), **options)
    with pytest.raises(Stop):
        stopped.train()
    resumed = trainer(tmp_path / "b", adapted(encoder(dropout=0.1)), data, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert_same(trained(resumed.model), trained(straight.model))


def test_a_collator_pads_texts_and_knows_equal_ones() -> None:
    batch = EmbeddingCollator(0)(rows(2, negatives=lambda n: n))
    assert batch["input_ids"].shape == (2, 3, 8) and batch["weight"].tolist() == [1, 1]
    assert batch["attention_mask"].sum(-1).tolist() == [[3, 4, 0], [3, 4, 3]]
    same = EmbeddingCollator(0)([row | {"query_input_ids": row["positive_input_ids"]} for row in rows(2)])
    assert torch.equal(same["text_keys"][:, 0], same["text_keys"][:, 1])
    assert same["text_keys"][0, 0] != same["text_keys"][1, 0]
    assert EmbeddingCollator(0, negatives=1)(rows(2, lambda _: 3))["input_ids"].shape[1] == 3


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES))
    made = trainer(tmp_path, adapted(causal), rows(2))
    with pytest.raises(TrainingError, match=r"returns no last_hidden_state; load the base by AutoModel"):
        made.compute_loss(made.model, made.data_collator(rows(2)))
    made = trainer(tmp_path, adapted(encoder()), rows(2), eval_dataset=[row | {"weight": 0.0} for row in rows(2)],
                   prediction_loss_only=True)  # fmt: skip
    with pytest.raises(TrainingError, match="all its weights are 0"):
        made.evaluate()
    batch = made.data_collator(rows(2))
    del batch["text_keys"]
    with pytest.raises(TrainingError, match="give data_collator=EmbeddingCollator"):
        made.compute_loss(made.model, batch)
