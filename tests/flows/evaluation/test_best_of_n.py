"""Best-of-n of an adapter: a scorer chooses among sampled answers; one answer scores as the samples do on average."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from flows.data.encoders import ChatEncoder
from flows.data.examples import Example, question_and_answer
from flows.data.rows import Row
from flows.errors import StageError
from flows.evaluation.best_of_n import measure_best_of_n
from flows.params import Params

OPTIONS: dict[str, Any] = {"answers": 6, "scorer": "length", "rows": 3}


@pytest.fixture
def params(answering: Callable[..., Params]) -> Params:
    params = answering(data={"source": "rows.jsonl"})
    evaluate = params.evaluate.model_dump() | {"scorers": ["length"], "best_of_n": OPTIONS, "max_new_tokens": 4}
    return Params.model_validate(params.model_dump() | {"evaluate": evaluate})


@pytest.fixture
def rows(params: Params, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    encoder = ChatEncoder(tokenizer, params.data)
    made = []
    for number in range(5):
        messages = question_and_answer(f"How much is {number}?", f"{number}.", None)
        tokens = encoder.encode(Example(messages, group="g", slice="all", where="here"))
        made.append(tokens.columns() | {"id": tokens.id, "slice": "all"})
    return made


def test_the_best_of_more_answers_scores_higher_and_one_answer_as_the_mean(
    params: Params, adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> None:
    scored: dict[str, list[float]] = {}

    def score(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        assert reference.startswith(row["completion"]) and row["prompt"] == prompt
        scored.setdefault(prompt, []).append(float(sum(answer.encode()) % 101))
        return scored[prompt][-1]

    result = measure_best_of_n(params, adapted, tokenizer, rows, params.evaluate.scorers[0], score)
    assert result["prompts"] == 3 == len(scored) and all(len(values) == 6 for values in scored.values())
    curve = {one["n"]: one for one in result["curve"]}
    assert list(curve) == [1, 2, 4, 6]
    assert curve[1]["length"] == pytest.approx(sum(map(sum, scored.values())) / 18)
    assert curve[6]["length"] == pytest.approx(sum(map(max, scored.values())) / 3)
    values = [one["length"] for one in curve.values()]
    assert values == sorted(values) and values[-1] > values[0], "samples differ"
    assert curve[1]["kl_bound"] == 0 and all(0 <= one["rouge_l"] <= 1 for one in curve.values())
    again = measure_best_of_n(params, adapted, tokenizer, rows, params.evaluate.scorers[0], score)
    assert again == result, "the seed decides the samples"


def test_a_failing_scorer_stops_the_measurement(
    params: Params, adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> None:
    with pytest.raises(StageError, match="the scorer length failed on 18 of 18 answers of the adapter"):
        measure_best_of_n(params, adapted, tokenizer, rows, params.evaluate.scorers[0], lambda *_: float("nan"))
