"""What the Poly and MHR papers say, and how task_ids reach the layers."""

from typing import Any

import pytest
import torch
from method_example import Example, randomise
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from peftcore import ConfigError, get_peft_model
from peftcore.methods.poly import PolyConfig

EXAMPLE = Example(
    PolyConfig,
    options={"r": 4, "n_skills": 3, "n_splits": 2},
    merges=False,
    theirs="PolyConfig",
    parity={
        "plain": {"r": 4, "n_tasks": 3, "task_type": "FEATURE_EXTRACTION"},  # PEFT drops task_ids without a task type
        "two heads": {"r": 4, "n_tasks": 3, "n_skills": 3, "n_splits": 2, "task_type": "FEATURE_EXTRACTION"},
    },
    families=("llama", "bert", "t5"),
    inputs={"task_ids": torch.tensor([2, 0])},
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(input_ids)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    made = get_peft_model(Net().double(), PolyConfig(r=3, target_modules=["layer"], **options)).eval()
    randomise(made, 0.5)
    return made


def test_each_row_is_mixed_by_its_task_and_each_split_on_its_own() -> None:
    model = net(n_tasks=3, n_skills=4, n_splits=2)
    adapter, x = model.layer.adapters["default"], torch.randn(2, 5, 6, dtype=torch.float64)
    found = model(x, task_ids=torch.tensor([2, 1]))
    for row, task in enumerate((2, 1)):
        z = adapter.poly_router.module_logits[task].sigmoid().view(2, 4)
        weights = z / z.sum(1, keepdim=True)
        a = torch.cat([sum(weights[q, s] * adapter.poly_lora_A[q, s] for s in range(4)) for q in range(2)])
        b = torch.cat([sum(weights[q, s] * adapter.poly_lora_B[q, s] for s in range(4)) for q in range(2)], 1)
        expected = model.layer.base_layer(x[row]) + x[row] @ a @ b / 3
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)


def test_rows_may_be_flattened_and_tasks_a_list() -> None:
    model = net(n_tasks=2)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    found = model(x, task_ids=[0, 1, 1, 0])
    torch.testing.assert_close(model(x.flatten(0, 1), task_ids=[0, 1, 1, 0]), found.flatten(0, 1))


def test_training_draws_mixtures_around_the_logits() -> None:
    model = net(n_tasks=2)
    x = torch.randn(1, 6, dtype=torch.float64)
    tasks = torch.ones(1, dtype=torch.long)
    assert torch.equal(model(x, task_ids=tasks), model(x, task_ids=tasks))
    model.train()
    assert not torch.equal(model(x, task_ids=tasks), model(x, task_ids=tasks))
    router = model.layer.adapters["default"].poly_router
    with torch.no_grad():
        router.module_logits.fill_(-30.0)
        router.module_logits[:, 1] = 30.0
    weights = router(tasks, 1)
    torch.testing.assert_close(weights, torch.tensor([[[0.0, 1, 0, 0]]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_only_the_tasks_of_the_batch_get_gradients() -> None:
    model = net(n_tasks=3)
    model(torch.randn(2, 6, dtype=torch.float64), task_ids=torch.tensor([0, 2])).square().sum().backward()
    moved = model.layer.adapters["default"].poly_router.module_logits.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, False, True]


def test_generate_gives_each_row_its_task_also_with_beams() -> None:
    torch.manual_seed(0)
    decoder = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=32))
    small: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    both = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))
    for model, targets in ((decoder, ["c_attn", "c_fc"]), (both, ["q", "v", "wo"])):
        model = get_peft_model(model, PolyConfig(r=4, n_tasks=2, target_modules=targets)).eval()
        randomise(model, 3.0)
        tokens = torch.randint(1, 32, (1, 5)).expand(2, -1)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for beams in (1, 2):
            rows = model.generate(tokens, task_ids=torch.tensor([0, 1]), num_beams=beams, **options)
            for task in (0, 1):
                alone = model.generate(tokens[:1], task_ids=torch.tensor([task]), num_beams=beams, **options)
                assert torch.equal(alone[0], rows[task])
        assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_skills": 0}, "n_skills must be a positive integer; got 0"),
        ({"poly_type": "mhr"}, "poly_type must be one of 'poly'; got 'mhr'"),
        ({"n_splits": 4}, "n_splits must divide 6 and 8 at layer, got 4; try 2"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net(**options)


def test_impossible_tasks() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ConfigError, match="give task_ids, the task"):
        net(n_tasks=2)(x)
    for tasks in ([0, 1, 2], [-1, 0, 0]):
        with pytest.raises(ConfigError, match="must be from 0 to 1"):
            net(n_tasks=2)(x, task_ids=torch.tensor(tasks))
    with pytest.raises(ConfigError, match="2 task_ids do not fit the 3 tokens at layer"):
        net(n_tasks=2)(x, task_ids=torch.tensor([0, 1]))
