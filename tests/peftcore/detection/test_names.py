"""Names for `target_modules`."""

import pytest
from detection_models import CASES, build

from peftcore.detection import detect
from peftcore.detection.module_tree import pattern_of


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit", "mamba"])
def test_names_without_a_star_are_suffixes_of_exactly_the_counted_layers(family: str) -> None:
    model = build(family, CASES[family][0], **CASES[family][1])
    for name, info in detect(model).target_modules.items():
        paths = [path for path, _ in model.named_modules() if f".{path}".endswith(f".{name}")]
        assert "*" in name or len(paths) == info.count, name


def test_index_of_a_block_becomes_a_star_and_a_final_index_stays() -> None:
    assert pattern_of("model.layers.3.mlp.0") == "model.layers.*.mlp.0"
