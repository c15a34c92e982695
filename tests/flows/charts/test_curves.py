"""Charts show names out of the data as they are."""

import pytest

from flows.charts.curves import slice_dumbbells


@pytest.mark.parametrize("name", ["$x_$", "$", "a$b$c", r"\frac", "$$", "<b>&"])
def test_a_slice_s_name_is_no_mathematics(name: str) -> None:
    chart = slice_dumbbells({name: {"rows": 3, "base_loss": 2.0, "adapter_loss": 1.0}})
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"{shown} (3)" in chart
