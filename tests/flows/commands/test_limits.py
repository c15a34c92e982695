"""The command `limits`."""

import json
from typing import Any

from command_line import peftcore

from flows.params import load_params


def test_limits_are_shown_then_written(here: Any) -> None:
    here.paths.params.write_text(here.paths.params.read_text() + "gate: {min_loss_gain: 0.0}\n")
    before = here.paths.params.read_text()
    shown = peftcore("limits").stdout
    assert shown.startswith("gate:\n  min_loss_gain: 0.5") and "`peftcore limits --write` writes these lines" in shown
    assert here.paths.params.read_text() == before
    written = json.loads(peftcore("limits", "--write", "--json").stdout)
    assert written["written"] and written["limits"][0]["key"] == "min_loss_gain"
    assert load_params(here.paths.params).gate.min_loss_gain == written["limits"][0]["limit"] > 0.5
    assert "no stricter limit" in peftcore("limits").stdout
    assert json.loads(peftcore("limits", "--json").stdout) == {"written": False, "limits": []}
