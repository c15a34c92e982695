"""Judge the base and the adapter on the same test rows: loss of the known answers, and answers of their own.

Both are computed on the weights that training saw, dequantised once, with the adapter switched on and off.
"""

import contextlib
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.base_model import check_base, load_dequantized, load_tokenizer, padding_id
from flows.generation import Answers, generate_answers
from flows.params import Params
from flows.paths import Paths
from flows.progress import progress
from flows.rows import Row, read_rows
from flows.scoring import RowLosses, rouge_l, row_losses
from flows.stage import start
from peftcore import PeftModel
from peftcore.files import directory_written_atomically, sha256, write_atomically

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("slice", pa.string()),
        ("tokens", pa.int32()),
        ("base_loss", pa.float64()),
        ("adapter_loss", pa.float64()),
        ("reference", pa.string()),
        ("base_answer", pa.string()),
        ("adapter_answer", pa.string()),
        ("base_rouge_l", pa.float64()),
        ("adapter_rouge_l", pa.float64()),
        ("base_ended", pa.bool_()),
        ("adapter_ended", pa.bool_()),
    ]
)
"""Columns of rows.parquet; the answers' are null for rows that were only scored."""


@dataclass(frozen=True)
class Judged:
    """What one model did: the losses of all rows, and answers to the generated ones with their ROUGE-L."""

    losses: RowLosses
    answers: Answers
    rouge_l: list[float]

    def metrics(self) -> dict[str, float]:
        """Headline figures; rouge_l and ended are means over the generated rows."""
        ended = [answer.ended for answer in self.answers.answers]
        return {
            "loss": self.losses.loss,
            "perplexity": self.losses.perplexity,
            "rouge_l": sum(self.rouge_l) / len(self.rouge_l),
            "ended": sum(ended) / len(ended),
            "tokens_per_second": round(self.answers.tokens_per_second, 1),
        }


def run(params: Params, paths: Paths) -> None:
    """Evaluate; writes the rows, the metrics and a table of samples."""
    base = check_base(paths.base)
    rows = read_rows(paths.split("test"), limit=params.evaluate.rows)
    generated = _sample(rows, params.evaluate.generate_rows, params.project.seed)
    tokenizer = load_tokenizer(paths.base)
    model = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization), paths.adapter)
    with progress(2 * (len(rows) + len(generated)), "evaluate", "row") as bar:
        judged: dict[str, Judged] = {}
        for name, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
            with context:
                judged[name] = _judge(model, tokenizer, rows, generated, params, bar)
    metrics = _metrics(judged, rows, len(generated))
    metrics |= {"evaluation_set": sha256(paths.split("test")), "base_model": base}
    table = _table(rows, generated, judged)
    with directory_written_atomically(paths.evaluation) as folder:
        parquet.write_table(pa.Table.from_pylist(table, schema=ROWS), folder / paths.evaluation_rows.name)
        samples = _samples(rows, generated, judged, params.evaluate.samples)
        for name, content in ((paths.evaluation_metrics.name, metrics), (paths.samples.name, samples)):
            write_atomically(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sample(rows: list[Row], count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def _judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    generated: list[int],
    params: Params,
    bar: Any,
) -> Judged:
    evaluate = params.evaluate
    losses = row_losses(model, rows, padding_id(tokenizer), evaluate.batch_size, bar)
    prompts = [rows[i]["input_ids"][: rows[i]["prompt_length"]] for i in generated]
    answers = generate_answers(model, tokenizer, prompts, evaluate.max_new_tokens, evaluate.batch_size, bar)
    references = [rows[i]["completion"] for i in generated]
    return Judged(losses, answers, rouge_l(references, [answer.text for answer in answers.answers]))


def _metrics(judged: dict[str, Judged], rows: list[Row], generated: int) -> dict[str, Any]:
    base, adapter = judged["base"].metrics(), judged["adapter"].metrics()
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        members[row["slice"]].append(i)
    return {
        "base": base,
        "adapter": adapter,
        "gain": {"loss": base["loss"] - adapter["loss"], "rouge_l": adapter["rouge_l"] - base["rouge_l"]},
        "rows": len(rows),
        "generated_rows": generated,
        "slices": {
            name: {
                "rows": len(indices),
                "base_loss": judged["base"].losses.of(indices).loss,
                "adapter_loss": judged["adapter"].losses.of(indices).loss,
            }
            for name, indices in sorted(members.items())
        },
    }


def _table(rows: list[Row], generated: list[int], judged: dict[str, Judged]) -> list[Row]:
    table: list[Row] = [
        {"id": row["id"], "slice": row["slice"], "tokens": judged["base"].losses.tokens[i]}
        | {f"{name}_loss": one.losses.means[i] for name, one in judged.items()}
        for i, row in enumerate(rows)
    ]
    for place, i in enumerate(generated):
        table[i]["reference"] = rows[i]["completion"]
        for name, one in judged.items():
            answer = one.answers.answers[place]
            table[i] |= {
                f"{name}_answer": answer.text,
                f"{name}_ended": answer.ended,
                f"{name}_rouge_l": one.rouge_l[place],
            }
    return table


def _samples(rows: list[Row], generated: list[int], judged: dict[str, Judged], count: int) -> list[dict[str, str]]:
    return [
        {
            "id": rows[i]["id"],
            "slice": rows[i]["slice"],
            "prompt": rows[i]["prompt"],
            "reference": rows[i]["completion"],
        }
        | {name: one.answers.answers[place].text for name, one in judged.items()}
        for place, i in enumerate(generated[:count])
    ]


if __name__ == "__main__":
    start(run)
