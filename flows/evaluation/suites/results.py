"""Results of prompt suites: the answers of a model, and the assertions that each answer fails."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.data.chat import render
from flows.data.rows import Row
from flows.errors import StageError
from flows.evaluation.generation import Answer, Sampling, generate_answers
from flows.evaluation.suites.assertions import Check, check_of
from flows.params.suites import Prompt, Suite
from flows.runtime.progress import progress

Checks = Mapping[str, list[list[Check]]]
"""{suite: for each prompt, the functions of its assertions}"""


def suite_checks(suites: Mapping[str, Suite], root: Path) -> Checks:
    """Return the functions of all assertions, so that a mistake is found before a model is loaded.

    Args:
        suites: {name: suite}.
        root: The repository, with the files of schemas and scorers.

    Raises:
        StageError: A pattern, a schema or a scorer cannot be used.
    """
    return {
        name: [[check_of(assertion, root) for assertion in prompt.must] for prompt in suite.prompts]
        for name, suite in suites.items()
    }


def answer_suites(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suites: Mapping[str, Suite],
    checks: Checks,
    batch_size: int,
    root: Path,
) -> dict[str, Any]:
    """Return the content of suites.json: for each suite its identity and settings, and all answers with their failures.

    Args:
        model: A PeftModel with the adapter enabled.
        tokenizer: The base's tokenizer.
        suites: {name: suite}, with every value filled in.
        checks: What `suite_checks` returns for these suites.
        batch_size: Prompts per batch.
        root: The repository, for the identities of the suites.

    Raises:
        StageError: A prompt does not fit into the model's context, or a scorer with `on_error: stop` failed.
        DataError: The chat template refuses a prompt.
    """
    results = {}
    total = sum(len(suite.prompts) * max(1, len(suite.seeds)) for suite in suites.values())
    with progress(total, "answer suites", "prompt") as bar:
        for name, suite in suites.items():
            answers = _answers(model, tokenizer, name, suite, batch_size, bar)
            prompts = [
                _prompt_result(suite, prompt, functions, [of_seed[index] for of_seed in answers])
                for index, (prompt, functions) in enumerate(zip(suite.numbered, checks[name], strict=True))
            ]
            settings = {"seeds": suite.seeds, "pass_at": suite.pass_at, "at_least": suite.at_least}
            results[name] = suite.identity(root) | settings | {"prompts": prompts}
    return results


def _answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, suite: Suite, batch_size: int, bar: Any
) -> list[list[Answer]]:
    """Return the answers to all prompts for each seed; one greedy list without seeds."""
    assert suite.max_new_tokens is not None  # `load_suites` fills it in
    ids = []
    longest = getattr(model.config, "max_position_embeddings", None)
    for prompt in suite.numbered:
        text = render(tokenizer, suite.chat(prompt), generate=True)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        if longest is not None and len(ids[-1]) + suite.max_new_tokens > longest:
            raise StageError(
                f"the prompt {prompt.id} of the suite {name} has {len(ids[-1])} tokens, and {suite.max_new_tokens} "
                f"for the answer do not fit into the {longest} of this model; shorten it, or lower max_new_tokens"
            )
    samplings = [Sampling(seed, suite.temperature, suite.top_p) for seed in suite.seeds] or [None]
    return [
        generate_answers(model, tokenizer, ids, suite.max_new_tokens, batch_size, bar, sampling).answers
        for sampling in samplings
    ]


def _prompt_result(suite: Suite, prompt: Prompt, checks: list[Check], answers: list[Answer]) -> dict[str, Any]:
    turns = [turn for turn in suite.chat(prompt) if turn["role"] != "system"]
    alone = len(turns) == 1
    text = turns[0]["content"] if alone else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    row: Row = {"id": prompt.id, "prompt": text, "reference": prompt.reference}
    return {
        "id": prompt.id,
        "prompt": text,
        "must": [assertion.words for assertion in prompt.must],
        "answers": [
            {
                "seed": seed,
                "text": answer.text,
                "ended": answer.has_eos,
                "failed": {
                    str(index): f"{prompt.must[index].words}: {why}"
                    for index, check in enumerate(checks)
                    if (why := check(row, answer.text)) is not None
                },
            }
            for seed, answer in zip(suite.seeds or [None], answers, strict=True)
        ],
    }
