"""Charts show names out of the data as they are."""

import pytest

from flows.charts.curves import reliability, slice_dumbbells


@pytest.mark.parametrize("name", ["$x_$", "$", "a$b$c", r"\frac", "$$", "<b>&"])
def test_a_slice_s_name_is_no_mathematics(name: str) -> None:
    chart = slice_dumbbells({name: {"rows": 3, "base_loss": 2.0, "adapter_loss": 1.0}})
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"{shown} (3)" in chart


def test_a_reliability_plot_names_both_errors() -> None:
    side = {"ece": 0.05, "bins": [{"share": 1.0, "accuracy": 0.5, "confidence": 0.55}]}
    drawn = str(reliability(side, side | {"ece": 0.125}))
    assert "base (ECE 0.050)" in drawn and "adapter (ECE 0.125)" in drawn
    assert 'aria-label="Accuracy by confidence, base against adapter"' in drawn
