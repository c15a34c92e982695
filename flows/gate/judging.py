"""The judge's comparison of candidate and champion, and the figures of its verdicts.

A prompt is won or lost if the same version's answer is chosen in both orders. It is a tie if the orders disagree, if
either is a tie, or if the answers are equal. Ties are left out of the win rate (sign test). A prompt with an unreadable
reply counts as lost, so that replies without a verdict never help a candidate.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from flows.gate.candidate import AnswerPair, Candidate
from flows.gate.reevaluation import run_process, test_file
from flows.params import Params
from flows.paths import Paths
from flows.registry.lineage import read_json
from flows.registry.reader import RegistryReader, Version
from flows.registry.registered_files import files_of
from peftcore.files import write_atomically

OUTCOMES = ("won", "lost", "tied", "equal", "unreadable")


def judge_answers(
    params: Params,
    paths: Paths,
    registry: RegistryReader,
    candidate: Candidate,
    taken_from: Version | None,
    pairs: Sequence[AnswerPair],
) -> dict[str, Any]:
    """Let the judge compare the answers, and write them with the verdicts to `paths.judgement`.

    Args:
        params: The rules, with the judge.
        paths: The repository.
        registry: The registry.
        candidate: The version whose test rows have the prompts.
        taken_from: The registered version to take the test rows from; None takes those of the last run.
        pairs: The answers of candidate and champion.

    Returns:
        The figures of `judge_figures`, with the judge's identity and the SHA-256 of the verdicts.

    Raises:
        StageError: The judge cannot be used, fails, or does not answer; or the test rows cannot be read.
    """
    from pyarrow import parquet

    judge = params.gate.judge
    if judge.rows is not None and judge.rows < len(pairs):
        chosen = sorted(random.Random(params.project.seed).sample(range(len(pairs)), judge.rows))
        pairs = [pairs[index] for index in chosen]
    with ExitStack() as stack:
        data = paths if taken_from is None else stack.enter_context(files_of(paths, registry, taken_from, [paths.data]))
        test = test_file(data, candidate.metrics["evaluation_set"], candidate.version)
        table = parquet.read_table(test, columns=["id", "prompt"])
    prompts = dict(zip(*(table[name].to_pylist() for name in ("id", "prompt")), strict=True))
    task = {
        "judge": judge.model_dump(),
        "pairs": [pair._asdict() | {"prompt": prompts[pair.id]} for pair in pairs],
        "cache": str(paths.judge_cache.absolute()),
        "root": str(paths.root.absolute()),
    }
    result = run_process("flows.stages.judge", task, "verdicts.json", read_json, "the comparison by the judge")
    for row in result["rows"]:
        row["outcome"] = outcome([reply["choice"] for reply in row["replies"]])
    text = json.dumps({"candidate": candidate.version, **result}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(paths.judgement, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return judge_figures(result["rows"], judge.confidence) | {"identity": result["identity"], "verdicts": digest}


def outcome(choices: Sequence[str]) -> str:
    """Return one of OUTCOMES for a prompt.

    Args:
        choices: The choice with the candidate's answer first, and with the champion's first; empty for equal answers.
    """
    if not choices:
        return "equal"
    if "unreadable" in choices:
        return "unreadable"
    return {("first", "second"): "won", ("second", "first"): "lost"}.get((choices[0], choices[1]), "tied")


def judge_figures(rows: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """Return the figures of a comparison.

    Args:
        rows: Mappings with `outcome` and `replies`, as `judge_answers` writes them.
        confidence: Confidence level of the lower bound.

    Returns:
        The number of `prompts` and of each outcome; `win_rate`, won / (won + lost + unreadable), and its `lower_bound`
        (exact, one-sided, by Clopper and Pearson), which are None and 0 if nothing was decided; `p_value` of the sign
        test against a win rate of 0.5; `first_chosen`, the share of the first answer among replies that choose one
        (None without such a reply; 0.5 without position bias), and the numbers of prompts with the same position chosen
        in both orders, `always_first` and `always_second`.
    """
    from scipy.stats import binomtest

    counts = Counter(row["outcome"] for row in rows)
    decided = counts["won"] + counts["lost"] + counts["unreadable"]
    test = binomtest(counts["won"], decided, alternative="greater") if decided else None
    orders = [tuple(reply["choice"] for reply in row["replies"]) for row in rows]
    choices = Counter(choice for order in orders for choice in order)
    chosen = choices["first"] + choices["second"]
    return {
        "prompts": len(rows),
        **{name: counts[name] for name in OUTCOMES},
        "win_rate": counts["won"] / decided if decided else None,
        "lower_bound": float(test.proportion_ci(confidence).low) if test else 0.0,
        "p_value": float(test.pvalue) if test else 1.0,
        "first_chosen": choices["first"] / chosen if chosen else None,
        "always_first": orders.count(("first", "first")),
        "always_second": orders.count(("second", "second")),
    }
