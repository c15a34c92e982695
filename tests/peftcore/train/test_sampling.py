"""Answers of a model in training: padding, ends, seeds, distribution, and out-of-memory errors."""

from typing import Any

import pytest
import torch
from quiet_training import tiny_llama
from tiny_pairs import adapted

from peftcore import ConfigError
from peftcore.train import PromptCollator, Sampling
from peftcore.train.sampling import AnswerSampler, SampledAnswer, sampling_seed, supervised_batch

PROMPTS = [[5, 6, 7, 8, 9], [4], [11, 12]]


def sampler(end: int = 3, **options: Any) -> AnswerSampler:
    return AnswerSampler(Sampling(**({"max_new_tokens": 6} | options)), [end], pad=0)


def greedy_by_hand(model: Any, prompt: list[int], end: int, limit: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] != end):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_are_those_of_each_prompt_alone() -> None:
    model = adapted().eval()
    free = [greedy_by_hand(model, prompt, -1, 6) for prompt in PROMPTS]
    end = free[0][2]
    answers = sampler(end).answers(model, PROMPTS, None)
    expected = [greedy_by_hand(model, prompt, end, 6) for prompt in PROMPTS]
    assert [answer.ids for answer in answers] == expected
    assert [answer.ended for answer in answers] == [ids[-1] == end for ids in expected]
    assert answers[0].ended and len(answers[0].ids) <= 3


def test_a_seed_decides_the_answers_and_nothing_else() -> None:
    model = adapted(lora_dropout=0.5).train()
    state = torch.get_rng_state()
    first = sampler().answers(model, PROMPTS, 7)
    torch.rand(3)
    assert sampler().answers(model, PROMPTS, 7) == first
    assert sampler().answers(model, PROMPTS, 8) != first
    torch.set_rng_state(state)
    sampler().answers(model, PROMPTS, 7)
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_answers_follow_the_models_distribution_at_the_temperature() -> None:
    model, count = adapted().eval(), 4000
    model.generation_config.repetition_penalty = 5.0  # settings of a model for chatting do not change its training
    model.generation_config.top_k = 3
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5).softmax(-1)
    answers = sampler(max_new_tokens=1, temperature=0.5).answers(model, [PROMPTS[0]] * count, 1)
    shares = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=50) / count
    assert (shares - expected).abs().max() < 5 * (expected.max() / count) ** 0.5
    nucleus = sampler(max_new_tokens=1, top_p=0.2).answers(model, [PROMPTS[0]] * 200, 1)
    with torch.no_grad():
        order = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).sort(descending=True)
    inside = order.indices[: int((order.values.cumsum(0) < 0.2).sum()) + 1].tolist()
    assert {answer.ids[0] for answer in nucleus} <= set(inside) and len(inside) < 50


def test_answers_that_do_not_fit_are_generated_in_parts() -> None:
    model, generated = adapted().eval(), sampler()
    original, sizes = model.generate, []

    def limited(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(**arguments)

    model.generate = limited
    answers = generated.answers(model, PROMPTS, None)
    assert sizes == [3, 1, 1, 1] and generated.rows_at_once == 1
    del model.generate
    assert [answer.ids for answer in answers] == [answer.ids for answer in sampler().answers(model, PROMPTS, None)]
    model.generate = limited
    with pytest.raises(torch.OutOfMemoryError):
        sampler().answers(model, PROMPTS, None, split=False)


def test_text_is_the_answer_without_its_end() -> None:
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return " " + "".join("abcdefgh"[token] for token in ids)

    assert SampledAnswer([1, 2, 3], ended=True).text(Letters()) == "bc"
    assert SampledAnswer([1, 2, 3], ended=False).text(Letters()) == "bcd"


def test_only_answers_have_labels() -> None:
    batch = supervised_batch([[5, 6], [7]], [SampledAnswer([8], True), SampledAnswer([9, 10, 11], False)], pad=0)
    assert batch["input_ids"][:, :4].tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert batch["labels"][:, :4].tolist() == [[-100, -100, 8, -100], [-100, 9, 10, 11]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4]


def test_a_batch_of_prompts_keeps_its_rows() -> None:
    rows = [{"input_ids": [1, 2], "id": "a"}, {"input_ids": [3], "id": "b", "weight": 0.5}]
    batch = PromptCollator()(rows)
    assert batch["rows"] == rows and batch["weight"].tolist() == [1.0, 0.5]


def test_seeds_differ_by_run_step_part_and_process() -> None:
    seeds = {sampling_seed(run, step, part, process) for run in (0, 42) for step in range(5) for part in (0, 1, 2)
             for process in (0, 1)}  # fmt: skip
    assert len(seeds) == 2 * 5 * 3 * 2 and max(seeds) < 2**63
    assert sampling_seed(2**32 - 1, 10**6, 7, 3) < 2**63


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_a_base_without_adapters_generates_too() -> None:
    assert len(sampler().answers(tiny_llama(), PROMPTS, 3)) == 3
