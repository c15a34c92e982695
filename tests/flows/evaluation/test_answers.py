"""Which rows are answered, and how long the known answers are beside what a model may write."""

from flows.evaluation.answers import Prompt, known_lengths, sampled_prompts
from flows.params import Evaluate, Params


def test_known_answers_that_do_not_fit_are_counted() -> None:
    rows = [{"input_ids": list(range(3 + answer))} for answer in (4, 5, 6, 9)]
    prompts = [Prompt(number, [0, 1, 2], "") for number in (0, 1, 3)]
    evaluate = Evaluate(max_new_tokens=4, generate_rows=3, samples=1)
    assert known_lengths(rows, prompts, "input_ids", evaluate) == {"max_new_tokens": 4, "longer_known_answers": 2 / 3}


def test_a_sample_of_rows_is_the_seeds_and_its_prompts_end_where_the_answers_begin() -> None:
    rows = [{"input_ids": [n, n, 7, 8], "prompt_length": 2, "completion": f"answer {n}"} for n in range(40)]

    def sample(seed: int, count: int = 8) -> list[Prompt]:
        evaluate = {"generate_rows": count, "samples": 1}
        params = Params.model_validate({"project": {"seed": seed}, "evaluate": evaluate})
        return sampled_prompts(rows, "input_ids", "completion", params)

    prompts = sample(1)
    assert prompts == sample(1) != sample(2)
    assert len({prompt.row for prompt in prompts}) == 8
    assert [prompt.row for prompt in prompts] == sorted(prompt.row for prompt in prompts)
    assert all(prompt == Prompt(prompt.row, [prompt.row] * 2, f"answer {prompt.row}") for prompt in prompts)
    assert [prompt.row for prompt in sample(1, 64)] == list(range(40)), "of fewer rows than asked for, each once"
