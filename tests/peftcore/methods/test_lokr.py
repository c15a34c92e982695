"""What LyCORIS says of LoKr: ΔW is a Kronecker product."""

from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, PeftConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lokr import LoKrConfig, factorization

PATTERNS = {"rank_pattern": {"q_proj|query": 3, "lm_head": 1}, "alpha_pattern": {r".*(down_proj|dense)": 20}}
EXAMPLE = Example(
    LoKrConfig,
    options={"r": 1, "alpha": 3},
    layers={
        "Linear without bias": {"r": 4},  # both factors full
        "Conv1D": {"decompose_both": True, "init_weights": "lycoris"},
        "Conv1d": {"r": 4},
        "Conv2d": {"use_effective_conv2d": True},
    },
    theirs="LoKrConfig",
    parity={
        "low rank": {"r": 2, "alpha": 5},
        "full": {"r": 16},
        "both": {"r": 1, "decompose_both": True, "init_weights": "lycoris"},
        "factor": {"r": 2, "decompose_factor": 8, "decompose_both": True},
        "patterns": {"r": 2, **PATTERNS},
    },
    targets={"gpt2": ["lm_head"], "bert": ["query", "intermediate.dense", "classifier"]},  # PEFT's LoKr knows no Conv1D
)


def adapted(layer: nn.Module, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(layer).double(), LoKrConfig(target_modules=["0"], **options))
    randomise(net, 0.3)
    return net, adapter_set(net).adapters("default")["0"]


def test_the_papers_formula() -> None:
    layer, x = nn.Linear(12, 20).double(), torch.randn(4, 12, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, a = adapted(layer, r=1, alpha=3, decompose_both=True)
    w1, w2 = a.lokr_w1_a @ a.lokr_w1_b, a.lokr_w2_a @ a.lokr_w2_b
    assert w1.shape == (4, 3) and w2.shape == (5, 4)
    delta = torch.stack([torch.cat([w1[p, q] * w2 for q in range(3)], 1) for p in range(4)]).flatten(0, 1)
    torch.testing.assert_close(net(x), x @ (weight + 3 * delta).T + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "size, factor, expected",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (12, 5, (3, 4)),
        (12, 6, (6, 2)),
        (360, 7, (6, 60)),
    ],
)
def test_factorization(size: int, factor: int, expected: tuple[int, int]) -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    assert factorization(size, factor) == expected == theirs(size, factor)


def test_factorization_is_pefts_everywhere() -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    for size in range(2, 200):
        assert all(factorization(size, factor) == theirs(size, factor) for factor in (-1, 1, 2, 5, 16, 300))


@pytest.mark.parametrize("r, names", [(1, {"w1", "w2_a", "w2_b"}), (2, {"w1", "w2"})])
def test_a_factor_that_r_does_not_shrink_stays_full(r: int, names: set[str]) -> None:
    _, a = adapted(nn.Linear(12, 12), r=r)
    assert {name for name, _ in a.named_parameters()} == {f"lokr_{name}" for name in names}


def test_gradients_match_autograd_of_the_dense_form() -> None:
    net, a = adapted(nn.Linear(12, 20), r=1, decompose_both=True)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, *a.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 1},
        {"r": 8},
        {"r": 2, "use_effective_conv2d": True},
        {"r": 1, "decompose_both": True, "decompose_factor": 4},
    ],
    ids=["low rank", "full", "effective", "both"],
)
@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv1d(12, 20, 3, padding=1, stride=2), torch.randn(2, 12, 9)),
        (nn.Conv1d(12, 20, 1), torch.randn(2, 12, 9)),
        (nn.Conv2d(12, 20, (3, 5), padding=2, dilation=2), torch.randn(2, 12, 9, 9)),
        (nn.Conv2d(12, 20, 3, groups=2), torch.randn(2, 12, 5, 5)),
        (nn.Conv2d(12, 20, 1), torch.randn(2, 12, 5, 5)),
    ],
    ids=["Conv1d", "Conv1d 1", "Conv2d", "Conv2d grouped", "Conv2d 1x1"],
)
def test_convolutions(layer: nn.Module, x: torch.Tensor, options: dict[str, Any], tmp_path: Any) -> None:
    agrees_with_peft(layer, x, "LoKrConfig", LoKrConfig, options, tmp_path)


@pytest.mark.parametrize("init, zero", [(True, "lokr_w1_a"), ("lycoris", "lokr_w2_b"), (False, None)])
def test_start_values(init: bool | str, zero: str | None) -> None:
    config = LoKrConfig(target_modules=["0"], r=1, decompose_both=True, init_weights=init)
    net = get_peft_model(nn.Sequential(nn.Linear(25, 25)), config)
    a: Any = adapter_set(net).adapters("default")["0"]
    assert {name for name, p in a.named_parameters() if p.abs().max() == 0} == ({zero} if zero else set())


@pytest.mark.parametrize("rescale", [False, True])
def test_dropping_rows_acts_while_training_only(rescale: bool) -> None:
    net, _ = adapted(nn.Linear(12, 9), r=1, rank_dropout=0.4, rank_dropout_scale=rescale)
    x = torch.randn(1, 12, dtype=torch.float64)
    base = net[0].base_layer(x)
    whole = net.eval()(x) - base
    net.train()
    factors = torch.cat([(net(x) - base) / whole for _ in range(50)])
    kept = (factors.abs() > 1e-9).double()
    scale = 9 / kept.sum(1, keepdim=True).clamp(min=1) if rescale else 1
    torch.testing.assert_close(factors, kept * scale, rtol=1e-6, atol=1e-6)
    assert 0.5 < kept.mean() < 0.7


def test_impossible_options() -> None:
    for options, message in (
        ({"r": 0}, "positive integer; got 0"),
        ({"decompose_factor": 0}, "decompose_factor must be a positive integer; got 0"),
        ({"init_weights": "lora"}, "got 'lora'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoKrConfig(**options)


def test_the_missing_scale_of_hf_peft_before_0_14_is_warned_of() -> None:
    saved = {"peft_type": "LOKR", "r": 4, "alpha": 8, "target_modules": ["0"]}
    with pytest.warns(UserWarning, match="did not scale the update by alpha / r.* write the value of r as alpha"):
        PeftConfig.from_dict(saved, from_disk=True)
    for others in ({"alpha": 4}, {"rank_dropout_scale": False}):
        PeftConfig.from_dict(saved | others, from_disk=True)
