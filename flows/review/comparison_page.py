"""The page that compares runs: one HTML file, readable without a network. Its content security policy forbids loading.

The template escapes all text that comes from runs. The script is the same for every page.
"""

import json
from pathlib import Path
from typing import Any

from flows.review.comparison import Comparison
from flows.review.comparison_charts import (
    AXES,
    COLORS,
    DASHES,
    color,
    curves,
    parallel_coordinates,
    scatters,
    varied,
)
from flows.review.page import environment
from peftcore.files import write_atomically

PROMPTS = 40
"""Largest number of prompts on the page."""


def write_comparison(comparison: Comparison, out: Path, title: str) -> Path:
    """Write the page to `out` atomically; returns its path."""
    pages = environment()
    pages.filters |= {"plain": plain, "last_part": lambda where: where.rstrip("/").rpartition("/")[2]}
    write_atomically(out, pages.get_template("comparison.html").render(_content(comparison, title)))
    return out


def plain(value: Any) -> str:
    """Return a configuration value as readable text."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _content(comparison: Comparison, title: str) -> dict[str, Any]:
    runs, prompts = comparison.runs, comparison.prompts()
    charts = [curves(comparison, kind) for kind in ("training", "validation")]
    differing = [key for key in comparison.differing if key in varied(comparison)]
    return {
        "title": title,
        "runs": runs,
        "judged_by": comparison.judged_by,
        "champions": [run.name for run in runs if run.is_champion],
        "colors": [color(run) for run in range(len(runs))],
        "dashes": [run // len(COLORS) % len(DASHES) for run in range(len(runs))],
        "warnings": [(run.name, text) for run in runs for text in run.warnings],
        "figures": comparison.figures,
        "curves": [chart for chart in charts if chart is not None],
        "parallel": parallel_coordinates(comparison),
        "scatters": scatters(comparison),
        "axes": AXES,
        "more_parameters": len(comparison.differing) - len(differing) if len(differing) == AXES else 0,
        "differing": comparison.differing,
        "shared": comparison.shared,
        "prompts": prompts[:PROMPTS],
        "all_prompts": len(prompts),
    }
