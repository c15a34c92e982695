"""Best-of-n: reward and ROUGE-L of the best of several sampled answers, as a scorer chooses it.

The adapter samples n answers to each of some prompts of the test rows. The figures for fewer answers than n are means
over all choices from these n answers.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.answers import sampled_prompts
from flows.evaluation.generation import Sampling, generate_answers
from flows.evaluation.scorers.scores import ScoredAnswer, score_answers
from flows.evaluation.scorers.texts import Score
from flows.evaluation.scoring import rouge_l
from flows.params import Params, Scorer
from flows.runtime.progress import progress
from flows.training.objectives import rows_of
from peftcore.train import divergence_bound, expected_best


def measure_best_of_n(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], scorer: Scorer, score: Score
) -> dict[str, Any]:
    """Return the figures of `best_of_n`.

    Args:
        params: The parameters of the run.
        model: A PeftModel with its adapter enabled.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
        scorer: The entry of `evaluate.scorers` that chooses the best answer.
        score: Its function.

    Returns:
        The options, and `curve`: for n = 1, 2, 4, ... the means of the scorer and of ROUGE-L over the best of n
        answers, and the largest KL divergence of such answers from the adapter's (nats).

    Raises:
        StageError: The scorer failed on an answer, and its `on_error` is stop.
    """
    options, seed = params.evaluate.best_of_n, params.project.seed
    count = options.answers
    assert count is not None
    is_pair = rows_of(params).kind == "preference"
    ids, reference = ("chosen_input_ids", "chosen") if is_pair else ("input_ids", "completion")
    good = [number for number, row in enumerate(rows) if row.get("desirable", True)]
    prompts = sampled_prompts(rows, ids, reference, params, good, options.rows)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    sampling = Sampling(seed, options.temperature, options.top_p)
    evaluate = params.evaluate
    with progress(len(repeated), f"{count} answers to each prompt", "answer") as bar:
        output = generate_answers(
            model, tokenizer, [one.ids for one in repeated], evaluate.max_new_tokens, evaluate.batch_size, bar, sampling
        )
    texts = [answer.text for answer in output.answers]
    answers = [ScoredAnswer(rows[one.row], text, one.reference) for one, text in zip(repeated, texts, strict=True)]
    with progress(len(answers), f"score {count} answers to each prompt", "answer") as bar:
        scores = score_answers(scorer, score, answers, "the adapter", bar)
    rewards = _by_prompt([value for value in scores.values if value is not None], count)
    quality = _by_prompt(rouge_l([one.reference for one in repeated], texts), count)
    numbers = sorted({*(2**power for power in range(count.bit_length())), count})
    return {
        **options.model_dump(),
        "prompts": len(prompts),
        "failures": len(scores.failures),
        "curve": [
            {
                "n": n,
                scorer.name: expected_best(rewards, k=n),
                "rouge_l": expected_best(rewards, quality, n),
                "kl_bound": divergence_bound(n),
            }
            for n in numbers
        ],
    }


def _by_prompt(values: list[float], count: int) -> list[list[float]]:
    """Return the values of each prompt, of which there are `count`."""
    return [values[first : first + count] for first in range(0, len(values), count)]
