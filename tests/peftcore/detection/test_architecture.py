"""Records of an architecture: shapes, names for `target_modules`, regular expressions, JSON."""

import json
import re

import pytest
from detection_models import CASES, build

from peftcore.detection import Architecture, detect


def test_shapes_and_counts_of_grouped_query_attention(architectures: dict[str, Architecture]) -> None:
    modules = architectures["llama"].target_modules
    assert modules["k_proj"].shapes == ((64, 32, 2),)
    assert modules["down_proj"].shapes == ((176, 64, 2),)
    assert modules["q_proj"].patterns == ("model.layers.*.self_attn.q_proj",)
    assert architectures["llama"].block_pattern == "model.layers.*"


def test_conv1d_is_read_as_input_by_output(architectures: dict[str, Architecture]) -> None:
    c_fc = architectures["gpt2"].target_modules["c_fc"]
    assert (c_fc.in_features, c_fc.out_features) == (64, 256)


def test_feed_forward_and_roles_as_targets(architectures: dict[str, Architecture]) -> None:
    assert architectures["phi3"].feed_forward == ("gate_up_proj", "down_proj")
    assert architectures["bert"].targets("key") == ("key",)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit"])
def test_regex_reaches_exactly_the_counted_layers(family: str) -> None:

    model = build(family, CASES[family][0], **CASES[family][1])
    found = detect(model)
    for name, info in found.target_modules.items():
        regex = found.target_regex([name])
        paths = [path for path, _ in model.named_modules() if re.fullmatch(regex, path)]
        assert len(paths) == info.count, name


def test_everything_is_json(architectures: dict[str, Architecture]) -> None:
    for found in architectures.values():
        assert json.loads(json.dumps(found.to_dict()))["family"] == found.family
