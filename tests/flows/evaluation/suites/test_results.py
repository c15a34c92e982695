"""Answers of a real model to the prompts of suites."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flows.base.folder import load_tokenizer
from flows.base.model import load_dequantized
from flows.errors import StageError
from flows.evaluation.generation import Sampling, generate_answers
from flows.evaluation.suites.results import answer_suites, suite_checks
from flows.params import Suite
from flows.params.params import Quantization
from flows.verdicts import prompt_rate

PROMPTS = [
    {"id": "a", "prompt": "How much is 1 and 1?", "must": [{"not_contain": "zzz"}, {"contain": "zzz"}]},
    {
        "id": "b",
        "messages": [{"role": "user", "content": "Hi"}],
        "must": [{"score": {"scorer": "length", "at_least": 0}}],
    },
]


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return load_dequantized(tiny_base, Quantization())


def suite(**values: Any) -> dict[str, Suite]:
    return {"support": Suite.model_validate({"max_new_tokens": 5, "system_prompt": None, "prompts": PROMPTS} | values)}


def answers(model: Any, base: Path, suites: dict[str, Suite]) -> dict[str, Any]:
    checks = suite_checks(suites, Path())
    return answer_suites(model, load_tokenizer(base), suites, checks, 4, Path())["support"]


def test_an_answer_is_the_greedy_one_with_the_assertions_that_it_fails(model: Any, tiny_base: Path) -> None:
    tokenizer, suites = load_tokenizer(tiny_base), suite()
    result = answers(model, tiny_base, suites)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (alone,) = generate_answers(model, tokenizer, [ids], 5, 1).answers
    first, second = result["prompts"]
    (answer,) = first["answers"]
    assert (answer["seed"], answer["text"], answer["ended"]) == (None, alone.text, alone.has_eos)
    assert answer["failed"] == {"1": "must contain 'zzz': it lacks 'zzz'"}
    assert second["answers"][0]["failed"] == {} and second["prompt"] == "Hi"
    assert first["must"] == ["must not contain 'zzz'", "must contain 'zzz'"]
    assert {key: result[key] for key in ("content", "files")} == suites["support"].identity(Path())
    assert [prompt_rate(result, prompt) for prompt in result["prompts"]] == [0, 1]


def test_each_seed_has_an_answer_that_it_alone_decides(model: Any, tiny_base: Path) -> None:
    sampled = suite(seeds=[3, 4, 5], temperature=5.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result = answers(model, tiny_base, sampled)
    assert torch.equal(torch.get_rng_state(), before), "the state of the process stays"
    texts = [answer["text"] for answer in result["prompts"][0]["answers"]]
    assert [answer["seed"] for answer in result["prompts"][0]["answers"]] == [3, 4, 5]
    assert len(set(texts)) == 3
    fewer = answers(model, tiny_base, suite(seeds=[5], temperature=5.0))
    assert fewer["prompts"][0]["answers"][0]["text"] == texts[2]


def test_a_low_temperature_or_a_small_top_p_is_greedy(model: Any, tiny_base: Path) -> None:
    greedy = answers(model, tiny_base, suite())["prompts"][0]["answers"][0]["text"]
    for settings in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        sampled = answers(model, tiny_base, suite(seeds=[1], **settings))
        assert sampled["prompts"][0]["answers"][0]["text"] == greedy


def test_sampling_draws_from_the_models_own_distribution(model: Any, tiny_base: Path) -> None:
    """The first tokens of 400 answers have the frequencies of the softmax, within five standard errors."""
    tokenizer, ids = load_tokenizer(tiny_base), [5, 6, 7]
    count = 400
    drawn = generate_answers(model, tokenizer, [ids] * count, 1, count, sampling=Sampling(1, 0.7)).answers
    with torch.no_grad():
        probabilities = (model(torch.tensor([ids])).logits[0, -1].float() / 0.7).softmax(0)
    likely = int(probabilities.argmax())
    text, p = tokenizer.decode([likely]).strip(), float(probabilities[likely])
    same = [
        float(probabilities[token]) for token in range(len(probabilities)) if tokenizer.decode([token]).strip() == text
    ]
    p = sum(same)
    share = sum(answer.text == text for answer in drawn) / count
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5)


def test_a_prompt_that_does_not_fit_into_the_context_is_named(model: Any, tiny_base: Path) -> None:
    with pytest.raises(
        StageError, match=r"the prompt a of the suite support has \d+ tokens, and 100000 for the answer"
    ):
        answers(model, tiny_base, suite(max_new_tokens=100000))
