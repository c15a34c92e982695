"""Which token is chosen: the likeliest, or drawn with the probabilities that were asked for."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from peftcore.serving.sampling import SampledRow, Sampling, next_tokens, token_logprobs

LOGITS = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()


def draws(count: int, **given: float) -> Counter[int]:
    sampling = Sampling(1, seed=0, **given)  # type: ignore[arg-type]
    rows = [SampledRow(sampling, sampling.generator(), Counter())]
    return Counter(next_tokens(LOGITS, rows)[0] for _ in range(count))


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_temperature_0_is_the_likeliest(temperature: float) -> None:
    assert draws(50, temperature=temperature) == {3: 50}


def test_draws_follow_the_softmax_at_a_temperature() -> None:
    found = draws(20000)
    assert [found[token] / 20000 for token in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
    squared = draws(20000, temperature=0.5)
    expected = torch.tensor([0.01, 0.04, 0.09, 0.16]) / 0.3
    assert [squared[token] / 20000 for token in range(4)] == pytest.approx(expected.tolist(), abs=0.015)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    assert set(draws(500, top_p=0.4)) == {3}
    assert set(draws(500, top_p=0.41)) == {2, 3}
    assert set(draws(500, top_p=0.7)) == {2, 3}
    assert set(draws(2000, top_p=0.95)) == {0, 1, 2, 3}
    assert set(draws(200, top_p=1e-9)) == set(draws(200, top_p=1e-50)) == {3}


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    def of(beside: int) -> list[int]:
        rows = [Sampling(1, seed=number) for number in (7, *range(beside))]
        pairs = [SampledRow(sampling, sampling.generator(), Counter()) for sampling in rows]
        return [next_tokens(LOGITS.expand(len(rows), -1), pairs)[0] for _ in range(30)]

    assert of(0) == of(3)
    assert len(set(of(0))) > 1


def test_without_a_seed_each_request_draws_differently() -> None:
    one, other = Sampling(1).generator(), Sampling(1).generator()
    assert not torch.equal(torch.rand(8, generator=one), torch.rand(8, generator=other))


def chosen(counts: Counter[int] | None = None, **given: Any) -> int:
    sampling = Sampling(1, temperature=0.0, **given)
    return next_tokens(LOGITS, [SampledRow(sampling, sampling.generator(), counts or Counter())])[0]


def test_penalties_lower_the_tokens_that_the_completion_has() -> None:
    counts = Counter({3: 2, 2: 1})
    assert chosen(counts) == 3
    assert chosen(counts, presence_penalty=0.1) == 3  # both have it, and 3 stays above 2
    assert chosen(counts, presence_penalty=1.0) == 1
    assert chosen(counts, frequency_penalty=0.3) == 2  # twice 0.3 off log 0.4, once off log 0.3
    assert chosen(Counter({3: 1}), presence_penalty=-1.0, frequency_penalty=0.5) == 3


def test_a_bias_is_added_to_its_token() -> None:
    assert chosen(logit_bias={0: 5.0}) == 0
    assert chosen(logit_bias={3: -100.0}) == 2
    sampling = Sampling(1, seed=0, logit_bias={3: -100.0})
    row = SampledRow(sampling, sampling.generator(), Counter())
    assert {next_tokens(LOGITS, [row])[0] for _ in range(200)} == {0, 1, 2}


def test_log_probabilities_are_the_models_own() -> None:
    reported = token_logprobs(LOGITS[0] + 7, 1, 2)
    assert reported.token == 1 and reported.logprob == pytest.approx(math.log(0.2))
    assert [token for token, _ in reported.top] == [3, 2]
    assert [value for _, value in reported.top] == pytest.approx([math.log(0.4), math.log(0.3)])
    assert token_logprobs(LOGITS[0], 1, 0).top == []


def test_only_tokens_that_the_grammar_allows_are_chosen() -> None:
    allowed = {0: torch.tensor([True, True, False, False])}

    def drawn(**given: Any) -> Counter[int]:
        sampling = Sampling(1, seed=0, **given)
        row = SampledRow(sampling, sampling.generator(), Counter())
        free = SampledRow(Sampling(1), Sampling(1, seed=1).generator(), Counter())
        both = [next_tokens(LOGITS.expand(2, -1), [row, free], allowed) for _ in range(3000)]
        assert {token for _, token in both} == {0, 1, 2, 3}
        return Counter(token for token, _ in both)

    assert drawn(temperature=0.0) == {1: 3000}
    found = drawn()  # the probabilities of the other tokens, in proportion
    assert set(found) == {0, 1} and found[0] / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert set(drawn(logit_bias={3: 100.0})) == {0, 1}
    assert drawn(logit_bias={0: -100.0}, presence_penalty=2.0) == {1: 3000}


def test_top_p_counts_only_what_the_grammar_allows() -> None:
    allowed = {0: torch.tensor([True, True, False, False])}  # 1/3 and 2/3
    for top_p, expected in ((0.6, {1}), (0.7, {0, 1})):
        sampling = Sampling(1, seed=0, top_p=top_p)
        row = SampledRow(sampling, sampling.generator(), Counter())
        assert {next_tokens(LOGITS, [row], allowed)[0] for _ in range(300)} == expected


def test_a_mask_leaves_the_logits_as_they_are() -> None:
    logits = LOGITS.clone()
    sampling = Sampling(1, temperature=0.0)
    row = SampledRow(sampling, sampling.generator(), Counter())
    next_tokens(logits, [row], {0: torch.tensor([True, False, False, False])})
    assert torch.equal(logits, LOGITS)  # so that log-probabilities are the model's own
