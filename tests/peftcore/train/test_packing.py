"""A packed row computes of each document what the document computes alone, or is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from peftcore import LoraConfig, PromptTuningConfig, TrainingError, get_peft_model
from peftcore.train import (
    AdapterTrainer,
    PackedCollator,
    Packs,
    PackSampler,
    RightPaddingCollator,
    check_packable,
    token_losses,
)

pytestmark = pytest.mark.filterwarnings(
    # the deprecation is inside transformers' own scheduler set-up
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)

WINDOW = 4
PLAIN = (
    "codegen cohere deepseek_v3 exaone4 falcon gemma glm4 gpt2 gpt_bigcode gpt_neox gptj granite internlm3 llama "
    "nemotron olmo2 persimmon phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2"
)
WINDOWED = ("cohere2", "gemma2", "gemma3_text", "gpt_neo", "mistral", "olmo3")
EXACT: dict[str, dict[str, Any]] = {
    **{family: {} for family in PLAIN.split()},
    **{family: {"sliding_window": WINDOW} for family in WINDOWED},
}
"""Families, some with windows shorter than a document."""
CARRY_STATE = ["bamba", "falcon_mamba", "jamba", "lfm2", "mamba", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm"]
IGNORE_POSITIONS = ["biogpt", "bloom", "mpt", "openai-gpt", "opt"]
"""Their attention is maskable, but transformers' code makes no mask from the positions."""


def documents(count: int = 3, seed: int = 0, shortest: int = 5) -> list[dict[str, list[int]]]:
    """Rows of different lengths whose first tokens are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 50, (int(torch.randint(shortest, 12, (), generator=generator)),), generator=generator)
        made.append({"input_ids": ids.tolist(), "labels": [-100, -100, *ids[2:].tolist()]})
    return made


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, num_key_value_heads=2, **sizes))
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", **options))


def randomised(model_type: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = tiny(model_type, "cpu", **options).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


# -- layout ----------------------------------------------------------------------------------------------------------


def test_documents_lie_one_after_another_and_none_is_predicted_from_the_one_before() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    made = PackedCollator()(rows)
    assert made["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert made["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert made["use_cache"] is False and "attention_mask" not in made
    assert rows[0]["labels"] == [1, 2, 3]


def test_packs_lie_in_one_row_too() -> None:
    first, second, third = documents()
    made, expected = PackedCollator()([[first, second], [third]]), PackedCollator()([first, second, third])
    assert torch.equal(made["input_ids"], expected["input_ids"])
    assert torch.equal(made["position_ids"], expected["position_ids"])


def test_bounds_for_flash_attention_are_those_of_transformers() -> None:
    from transformers import DataCollatorWithFlattening

    rows = documents()
    ours = PackedCollator(varlen=True)(rows)
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([dict(row) for row in rows])
    assert set(ours) == {*theirs, "use_cache"}
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value, name
        assert not isinstance(value, Tensor) or ours[name].dtype == value.dtype


# -- exactness -------------------------------------------------------------------------------------------------------


def losses_and_gradients(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = torch.cat([token_losses(model, inputs_of(batch), batch["labels"])[0] for batch in batches])
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [*((family, "sdpa") for family in EXACT if family != "gemma2"), *((f, "eager") for f in ("llama", *WINDOWED))],
)
def test_losses_and_gradients_of_a_packed_row_are_those_of_its_documents(model_type: str, attention: str) -> None:
    model = randomised(model_type, **EXACT[model_type])
    model.set_attn_implementation(attention)
    collate, rows = PackedCollator(), documents()
    packed, gradients = losses_and_gradients(model, [collate(rows)])
    alone, expected = losses_and_gradients(model, [RightPaddingCollator(0, multiple=1)([row]) for row in rows])
    # float32 inside some families' attention
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys() and len(gradients) > 5
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
    # and it matters: one long document is another thing
    joined = collate(rows) | {"position_ids": torch.arange(packed.numel() + 2 * len(rows))[None]}
    assert (losses_and_gradients(model, [joined])[0] - alone).abs().max() > 1e-3


def test_experts_see_each_token_as_they_do_alone() -> None:
    model, rows = randomised("mixtral", torch.float32), documents()
    with torch.no_grad():
        packed = model(**inputs_of(PackedCollator()(rows))).logits
        alone = torch.cat([model(**inputs_of(PackedCollator()([row]))).logits for row in rows], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


# -- which models can ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["falcon", "gpt2", "gpt_neox", "llama", *WINDOWED])
def test_a_model_that_keeps_documents_apart_passes(model_type: str) -> None:
    model = randomised(model_type, **EXACT[model_type]).train()
    check_packable(model)
    assert model.training


@pytest.mark.parametrize("model_type", CARRY_STATE)
def test_a_model_that_carries_a_state_is_refused(model_type: str) -> None:
    with pytest.raises(TrainingError, match=r"leak from one document .*; train on padded rows"):
        check_packable(tiny(model_type))


@pytest.mark.parametrize("model_type", IGNORE_POSITIONS)
def test_a_model_whose_code_makes_no_mask_from_positions_is_refused(model_type: str) -> None:
    with pytest.raises(TrainingError, match=r"does not separate the documents"):
        check_packable(randomised(model_type))


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_model_that_is_no_causal_language_model_is_refused(model_type: str) -> None:
    with pytest.raises(TrainingError, match="need a causal language model"):
        check_packable(tiny(model_type))


def test_classifiers_and_virtual_tokens_are_refused() -> None:
    base = llama().unload()
    with pytest.raises(TrainingError, match="virtual tokens"):
        check_packable(get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(TrainingError, match="need a causal language model"):
        check_packable(LlamaForSequenceClassification(base.config))


# -- packs -----------------------------------------------------------------------------------------------------------


def lengths(count: int = 200, seed: int = 0) -> list[int]:
    return torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_row_comes_once_an_epoch_and_packs_are_nearly_full() -> None:
    known = lengths()
    sampler = PackSampler(known, tokens=128, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        packs = list(sampler)
        assert Counter(row for pack in packs for row in pack) == Counter(range(200))
        assert all(sum(known[row] for row in pack) <= 128 for pack in packs)
        assert len(packs) == len(sampler)
    assert sum(known) > 0.97 * 128 * len(sampler)


def test_best_fit_is_within_its_bound_of_the_optimum() -> None:
    # 11/9 OPT + 4 (Johnson 1974); OPT is at least the number of tokens over a pack's
    for seed in range(5):
        known = lengths(seed=seed)
        assert len(PackSampler(known, tokens=100)) <= 11 / 9 * -(-sum(known) // 100) + 4


def test_packs_are_a_function_of_seed_and_epoch_alone() -> None:
    sampler = PackSampler(lengths(), tokens=128, seed=1)
    first = list(sampler)
    torch.rand(17)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first and {frozenset(pack) for pack in sampler} != {frozenset(pack) for pack in first}
    assert list(PackSampler(lengths(), tokens=128, seed=2)) != first


def test_a_row_that_fits_no_pack_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"a row of 9 tokens does not fit a pack of 8; give packs at least 9"):
        PackSampler([3, 9, 4], tokens=8)
    assert list(PackSampler([], tokens=8)) == []


# -- training --------------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, data: Any, collator: Any, **options: Any) -> AdapterTrainer:
    callbacks = options.pop("callbacks", None)
    arguments: dict[str, Any] = {
        **{"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 1, "learning_rate": 1e-2},
        **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True},
        **{"dataloader_pin_memory": False, "log_level": "error", "max_grad_norm": 0.0},
    }
    made = AdapterTrainer(
        model=model,
        args=TrainingArguments(**(arguments | options)),
        train_dataset=data,
        eval_dataset=documents(9, seed=1),  # type: ignore[arg-type]
        data_collator=collator,
        callbacks=callbacks,
    )
    made.callback_handler.callbacks = [  # no printing
        callback for callback in made.callback_handler.callbacks if type(callback).__name__ != "PrinterCallback"
    ]
    return made


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses_of(made: AdapterTrainer) -> list[float]:
    return [record["loss"] for record in made.state.log_history if "loss" in record]


def test_padding_free_batches_train_as_padded_ones_do(tmp_path: Path) -> None:
    rows, weights, losses, evaluations = documents(12), [], [], []
    for collator in (RightPaddingCollator(0), PackedCollator()):
        made = trainer(
            llama(),
            tmp_path,
            rows,
            collator,
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2},
            **{"max_steps": -1, "train_sampling_strategy": "group_by_length", "weight_decay": 0.1},
        )
        made.train()
        weights.append(trained(made.model))
        losses.append(losses_of(made))
        evaluations.append(made.evaluate())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 6
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)  # Adam's first steps are signs
    assert evaluations[0]["eval_loss"] == pytest.approx(evaluations[1]["eval_loss"], abs=1e-4)
    assert evaluations[0]["eval_tokens"] == evaluations[1]["eval_tokens"]


def test_an_epoch_of_packs_sees_every_row_and_means_over_all_tokens_of_a_step(tmp_path: Path) -> None:
    rows = documents(12)
    model = llama()
    packs = Packs(rows, tokens=24)
    with torch.no_grad():
        losses = [token_losses(model, inputs_of(b), b["labels"])[0] for b in map(RightPaddingCollator(0), zip(rows))]
    made = trainer(
        model, tmp_path, packs, PackedCollator(), max_steps=1, gradient_accumulation_steps=len(packs), learning_rate=0.0
    )
    made.train()
    assert losses_of(made) == pytest.approx([torch.cat(losses).mean().item()], abs=1e-5)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_sees_the_packs_that_are_left(tmp_path: Path, stop: int) -> None:
    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == stop

    def run(folder: Path, **options: Any) -> AdapterTrainer:
        data = Packs(documents(16), tokens=24)
        assert len(data) < 12  # more than one epoch in six steps
        return trainer(
            llama(lora_dropout=0.2), folder, data, PackedCollator(), **{"gradient_accumulation_steps": 2, **options}
        )

    straight = run(tmp_path / "a")
    straight.train()
    run(tmp_path / "b", save_strategy="steps", save_steps=100, callbacks=[StopAt()]).train()
    resumed = run(tmp_path / "b", save_strategy="steps", save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(straight)
    for name, tensor in trained(straight.model).items():
        assert torch.equal(trained(resumed.model)[name], tensor), name


def test_the_trainer_asks_whether_the_model_can(tmp_path: Path) -> None:
    model = get_peft_model(randomised("opt"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="does not separate the documents"):
        trainer(model, tmp_path, documents(), PackedCollator())
    with pytest.raises(TrainingError, match=r"give data_collator=PackedCollator\(\)"):
        trainer(llama(), tmp_path, Packs(documents(), 32), RightPaddingCollator(0))
