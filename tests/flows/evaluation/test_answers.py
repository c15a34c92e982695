"""How long the known answers are beside what a model may write."""

from flows.evaluation.answers import Prompt, known_lengths
from flows.params import Evaluate


def test_known_answers_that_do_not_fit_are_counted() -> None:
    rows = [{"input_ids": list(range(3 + answer))} for answer in (4, 5, 6, 9)]
    prompts = [Prompt(number, [0, 1, 2], "") for number in (0, 1, 3)]
    evaluate = Evaluate(max_new_tokens=4, generate_rows=3, samples=1)
    assert known_lengths(rows, prompts, "input_ids", evaluate) == {"max_new_tokens": 4, "longer_known_answers": 2 / 3}
