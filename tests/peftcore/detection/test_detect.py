"""Detection on tiny models built from transformers' own configurations, and on modules that are not theirs."""

import pytest
from detection_models import CASES, LLAMA_ROLES, roles
from torch import nn

from peftcore.detection import Architecture, detect
from peftcore.errors import TargetError


@pytest.mark.parametrize("family", CASES)
def test_roles_kind_and_sizes(family: str, architectures: dict[str, Architecture]) -> None:
    found, (_, _, kind, expected) = architectures[family], CASES[family]
    assert found.family == family
    assert found.kind == kind
    assert roles(found) == expected
    assert (found.num_blocks, found.hidden_size) == (2, 64)
    assert found.vocab_size == (None if family == "vit" else 320)
    assert found.all_linear == tuple(
        n for n, role in roles(found).items() if "convolution" not in role and role != "head"
    )


def test_quantizable_layers_fill_whole_blocks_and_exclude_the_head(architectures: dict[str, Architecture]) -> None:
    # 176 input features are no multiple of 64
    assert set(architectures["llama"].quantizable) == set(LLAMA_ROLES) - {"lm_head", "down_proj"}
    assert architectures["llama"].memory_nf4 < architectures["llama"].memory_bfloat16


def test_a_plain_mlp_has_unknown_roles_and_no_proven_head() -> None:
    found = detect(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    assert roles(found) == {"0": "unknown", "2": "unknown"}
    assert found.all_linear == found.default_targets == ("0", "2")
    assert (found.kind, found.num_blocks, found.hidden_size, found.vocab_size) == ("other", 0, None, None)
    assert found.family == "Sequential"


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), nn.Embedding(4, 4)])
def test_nothing_to_adapt_says_what_was_found(model: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"no layer to adapt: found (no submodules|1 ReLU, 1 LayerNorm)"):
        detect(model)
