"""The summary of a run in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.gate.promote import Promotion
from flows.gate.proposal import Proposal, as_yaml
from flows.paths import Paths
from flows.registry.lineage import read_json

FIGURES = (
    ("test loss (nats)", "loss", "{:.3f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("ROUGE-L", "rouge_l", "{:.3f}"),
    ("EOS rate", "ended", "{:.1%}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("macro-F1", "macro_f1", "{:.3f}"),
    ("entity F1", "entity_f1", "{:.3f}"),
    ("right tags", "tag_accuracy", "{:.1%}"),
    ("recall@1", "recall_at_1", "{:.1%}"),
    ("recall@10", "recall_at_10", "{:.1%}"),
    ("MRR@10", "mrr_at_10", "{:.3f}"),
    ("nDCG@10", "ndcg_at_10", "{:.3f}"),
    ("margin (nats)", "margin", "{:.3f}"),
    ("reward accuracy", "reward_accuracy", "{:.1%}"),
    ("divergence from the teacher", "divergence", "{:.4f}"),
)
"""(label, key of metrics.json, format); figures that the objective lacks are left out."""


def print_summary(
    paths: Paths,
    promotion: Promotion,
    page: Path,
    seconds: Mapping[str, float],
    proposals: Sequence[Proposal] = (),
) -> None:
    """Print the figures of base and adapter, the verdict, the time of each task, the page's path, proposed limits."""
    console = Console(highlight=False)
    metrics = read_json(paths.metrics)
    console.print()
    console.print(_figures(metrics, promotion))
    merge = metrics["merge"]
    cosine = f"cosine {merge['cosine']:.4f}, " if "cosine" in merge else ""
    lines = (
        {"baseline": f"{baseline}, because the base has no trained head"}
        if (baseline := metrics.get("baseline"))
        else {}
    )
    lines |= {
        "merged": f"{cosine}KL {merge['kl']:.4f} nats, top-1 predictions agree on {merge['top1_agreement']:.1%}",
        "verdict": f"[{'green' if promotion.accepted else 'red'}]{escape(promotion.sentence)}[/]",
        "seconds": " · ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
    }
    notes = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        notes.add_row(f"[dim]{label}[/]", text)
    console.print(notes)
    console.print(f"[dim]{'page':<9}[/]{escape(str(page))}", soft_wrap=True)  # in one piece, so that it can be opened
    if proposals:
        console.print("\nThis first version supports stricter limits; `peftcore limits --write` writes them:")
        console.print(as_yaml(proposals), markup=False, soft_wrap=True)


def _figures(metrics: Mapping[str, Any], promotion: Promotion) -> Table:
    table = Table(title=f"{promotion.name} {promotion.version}", title_justify="left")
    table.add_column("on held-out rows")
    baseline = metrics.get("baseline")
    for column in ("baseline" if baseline else "base", "adapter"):
        table.add_column(column, justify="right")
    for label, key, form in FIGURES:
        if not any(key in metrics[side] for side in ("base", "adapter")):
            continue
        table.add_row(label, *(figure(metrics[side].get(key), form) for side in ("base", "adapter")))
    if latency := metrics.get("latency"):  # of answers of equal length, unlike the tokens per second of all answers
        table.add_row(
            "ms per token, one request", *(f"{latency[side]['token_ms']:.0f}" for side in ("base", "adapter"))
        )
    for name in metrics.get("scorers") or ():
        table.add_row(f"{name} (scorer)", *(figure(metrics[side].get(name), "{:.3f}") for side in ("base", "adapter")))
    for name, one in (metrics.get("benchmarks") or {}).items():
        figures = (figure(one[side]["value"], "{:.3f}") for side in ("base", "adapter"))
        table.add_row(f"{name} ({one['adapter']['metric'].partition(',')[0]})", *figures)
    for name, suite in (metrics.get("suites") or {}).items():
        passed = f"{suite['prompts'] - suite['failed']} of {suite['prompts']}"
        table.add_row(f"{name} (suite), prompts passed", "–", passed)
    return table


def figure(value: float | None, form: str) -> str:
    """Return a number as text; a dash for None."""
    return "–" if value is None else form.format(value)
