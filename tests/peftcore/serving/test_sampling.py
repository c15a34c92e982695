"""Which token is chosen: the likeliest, or drawn with the probabilities that were asked for."""

from collections import Counter

import pytest
import torch

from peftcore.serving.sampling import Sampling, next_tokens

LOGITS = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()


def draws(count: int, **given: float) -> Counter[int]:
    sampling = Sampling(1, seed=0, **given)  # type: ignore[arg-type]
    rows = [(sampling, sampling.generator())]
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
    assert set(draws(200, top_p=1e-9)) == {3}


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    def of(beside: int) -> list[int]:
        rows = [Sampling(1, seed=number) for number in (7, *range(beside))]
        pairs = [(sampling, sampling.generator()) for sampling in rows]
        return [next_tokens(LOGITS.expand(len(rows), -1), pairs)[0] for _ in range(30)]

    assert of(0) == of(3)
    assert len(set(of(0))) > 1


def test_without_a_seed_each_request_draws_differently() -> None:
    one, other = Sampling(1).generator(), Sampling(1).generator()
    assert not torch.equal(torch.rand(8, generator=one), torch.rand(8, generator=other))
