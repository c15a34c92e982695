"""The adapters to merge are read layer by layer, in the order of their names."""

from typing import Any

from peftcore.merging.sources import Sources


def test_layers_and_adapters_keep_their_order(linears: Any) -> None:
    model = linears(a={"target_modules": ["1"]}, b={"r": 3, "target_modules": ["0", "1"]})
    sources = Sources(model, ["b", "a"], "m")
    assert sorted(sources.paths) == ["0", "1"]
    present = {path: [change is not None for change in changes] for path, changes in sources.changes()}
    assert present == {"0": [True, False], "1": [True, True]}
    assert sources.largest_rank("0") == 3 and sources.largest_rank() == 4
