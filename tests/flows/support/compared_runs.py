"""Runs for tests of comparisons."""

from typing import Any

from flows.review.run import Run

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x$\x1b[31m"
"""A text that is markup, mathematics and a terminal's control sequence if nothing escapes it."""


def run(name: str, loss: float | None, **given: Any) -> Run:
    """Return a run of LoRA with curves of eight steps; given: further fields, and changes of its `config`."""
    config = {"train.learning_rate": 1e-3, "method.r": 8, "method.name": "lora", **given.pop("config", {})}
    history = {"loss": [(step, 3.0 / step) for step in range(1, 9)], "validation_loss": [(4, 2.9), (8, 2.8)]}
    summary = {} if loss is None else {"adapter.loss": loss}
    fields = {"id": name, "name": name, "where": f"/runs/{name}", "summary": summary, "history": history, **given}
    return Run(**fields, config=config)
