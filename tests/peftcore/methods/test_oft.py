"""What the OFT papers say: rotations keep the angles between neurons; COFT keeps near the identity; OFTv2's series."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from safetensors.torch import save_file
from torch import nn

from peftcore import CheckpointError, ConfigError, PeftConfig, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.kernels.maths import neumann
from peftcore.methods.oft import OFTConfig

EXAMPLE = Example(
    OFTConfig,
    options={"oft_block_size": 4},
    layers={
        "Linear without bias": {"use_cayley_neumann": False},
        "Conv1D": {"coft": True, "eps": 0.5},
        "Conv1d": {"block_share": True},
        "Conv2d": {"oft_block_size": 6},
        "Conv2d 1x1": {"oft_block_size": 0, "r": 2},
        "Embedding": {"use_cayley_neumann": False},
    },
    theirs="OFTConfig",
    parity={
        "series": {"oft_block_size": 8},
        "seven terms": {"oft_block_size": 8, "num_cayley_neumann_terms": 7},
        "inverse": {"oft_block_size": 0, "r": 4, "use_cayley_neumann": False},
        "constrained": {"oft_block_size": 8, "coft": True, "eps": 0.5, "use_cayley_neumann": False},
        "shared": {"oft_block_size": 8, "block_share": True, "bias": "oft_only"},
        "block that does not divide": {"oft_block_size": 30, "bias": "all"},
    },
    targets={"gpt2": ["lm_head"], "bert": ["query", "intermediate.dense", "classifier"]},  # PEFT's OFT knows no Conv1D
    spread=0.1,
)


def adapted(layer: nn.Module, spread: float = 0.3, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    options = {"oft_block_size": 4, "use_cayley_neumann": False, **options}
    net = get_peft_model(nn.Sequential(layer).double(), OFTConfig(target_modules=["0"], **options))
    randomise(net, spread)
    return net, adapter_set(net).adapters("default")["0"]


def rotation(a: Any, n: int) -> torch.Tensor:
    blocks = a.blocks().detach()
    return torch.block_diag(*(blocks if len(blocks) > 1 else blocks.expand(n, -1, -1)))


@pytest.mark.parametrize("share", [False, True])
def test_the_papers_formula(share: bool) -> None:
    layer, x = nn.Linear(12, 9).double(), torch.randn(4, 12, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, a = adapted(layer, block_share=share)
    skew = torch.zeros(4, 4, dtype=torch.float64)
    skew[*torch.triu_indices(4, 4, 1)] = a.oft_R.detach()[0]
    skew, eye = skew - skew.T, torch.eye(4, dtype=torch.float64)
    r = rotation(a, 3)
    torch.testing.assert_close(r[:4, :4], (eye - skew) @ torch.linalg.inv(eye + skew))
    assert torch.equal(r[:4, :4], r[4:8, 4:8]) == share
    torch.testing.assert_close(net(x), x @ (weight @ r.T).T + bias, rtol=1e-12, atol=1e-12)


def test_angles_and_lengths_of_neurons_are_kept() -> None:
    layer = nn.Linear(12, 9).double()
    weight = layer.weight.clone()
    net, _ = adapted(layer)
    merged = net.merge_and_unload()[0].weight
    assert (merged - weight).abs().max() > 0.1
    torch.testing.assert_close(merged @ merged.T, weight @ weight.T, rtol=1e-12, atol=1e-12)


def test_the_series_nears_the_inverse_of_the_other_sign() -> None:
    torch.manual_seed(0)
    skew = torch.randn(3, 6, 6, dtype=torch.float64) * 0.05
    skew, eye = skew - skew.mT, torch.eye(6, dtype=torch.float64)
    exact = (eye + skew) @ torch.linalg.inv(eye - skew)
    errors = [(neumann(skew, terms) - exact).abs().max() for terms in (2, 3, 5, 7, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_the_series_has_pefts_terms() -> None:
    from peft.tuners.oft.layer import OFTRotationModule

    rows = torch.randn(3, 15, dtype=torch.float64)
    theirs = OFTRotationModule(3, 15, 6, 18)
    skew = theirs._pytorch_skew_symmetric(rows, 6)
    for terms in range(2, 9):
        torch.testing.assert_close(neumann(skew, terms), theirs._cayley_batch(rows, 6, True, terms))


def test_the_constraint_bounds_each_block_and_lets_gradients_by() -> None:
    net, a = adapted(nn.Linear(12, 9), coft=True, eps=0.2)
    r = a.blocks()
    eye = torch.eye(4, dtype=torch.float64)
    skew = torch.linalg.solve(r + eye, eye - r)
    torch.testing.assert_close(skew.flatten(1).norm(dim=1), torch.full((3,), 0.2 / 3**0.5, dtype=torch.float64))
    net(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
    assert a.oft_R.grad.abs().max() > 0
    before = r.detach()
    assert a.oft_R.norm() > 1
    net.on_optimizer_step(1, None)
    assert a.oft_R.norm() < 0.2
    torch.testing.assert_close(a.blocks(), before)


def test_dropped_blocks_are_the_identity_while_training_only() -> None:
    layer, x = nn.Linear(20, 20, bias=False).double(), torch.eye(20, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    net, a = adapted(layer, module_dropout=0.5)
    whole = net.eval()(x)
    net.train()
    blocks = torch.stack([net(x).view(5, 4, 5, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1) for _ in range(30)])
    dropped = (blocks - torch.eye(4)).abs().amax((2, 3)) == 0
    assert (dropped.sum(1) == 2).all() and dropped.any(0).all()
    kept = rotation(a, 5).view(5, 4, 5, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1).expand(30, -1, -1, -1)
    torch.testing.assert_close(blocks[~dropped], kept[~dropped])
    net.merge_adapter()
    torch.testing.assert_close(net(x), whole)


def test_the_nearest_divisor_is_pefts() -> None:
    from peft.tuners.oft.layer import OFTLayer

    for features in (36, 48, 54, 97, 768):
        for asked in (2, 5, 30, 32, 500, 1000):
            theirs = OFTLayer.adjust_oft_parameters(None, features, asked)  # type: ignore[arg-type]
            theirs = asked if features % asked == 0 else theirs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for options, size in (
                    ({"oft_block_size": asked}, theirs),
                    ({"r": asked, "oft_block_size": 0}, features // theirs),
                ):
                    if size > 1:
                        assert OFTConfig(**options).block_size(features, "") == size
    with pytest.warns(UserWarning, match="oft_block_size=32 does not divide 48; 24 is used"):
        OFTConfig().block_size(48, "fc")


@pytest.mark.parametrize(
    "layer, merged",
    [(nn.Conv2d(6, 8, 1), False), (nn.Conv2d(6, 8, 3, padding=1, stride=2), True)],
    ids=["Conv2d 1x1", "Conv2d"],
)
def test_convolutions(layer: nn.Module, merged: bool, tmp_path: Any) -> None:
    """PEFT's own forward of larger kernels adds up overlapping patches, so there its merged weight is the oracle."""
    x, options = torch.randn(2, 6, 5, 5), {"oft_block_size": 3}
    agrees_with_peft(layer, x, "OFTConfig", OFTConfig, options, tmp_path, merged=merged, spread=0.1)


def test_embedding(tmp_path: Any) -> None:
    x, options = torch.randint(0, 20, (3, 5)), {"oft_block_size": 4}
    agrees_with_peft(nn.Embedding(20, 8), x, "OFTConfig", OFTConfig, options, tmp_path, spread=0.1)


def test_grouped_convolutions_turn_each_groups_patches_alike() -> None:
    layer, x = nn.Conv2d(4, 6, 3, groups=2).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = layer.weight.clone()
    net, a = adapted(layer, oft_block_size=6)
    turned = (weight.flatten(1) @ rotation(a, 3).T).view_as(weight)
    torch.testing.assert_close(net(x), nn.functional.conv2d(x, turned, layer.bias, groups=2))


def test_gradients_are_right() -> None:
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    for series in (False, True):
        net, a = adapted(nn.Linear(12, 9), use_cayley_neumann=series)
        assert torch.autograd.gradcheck(lambda *_, net=net: net(x), (x, a.oft_R))


def test_autocast_leaves_the_rotation_exact() -> None:
    net, a = adapted(nn.Linear(12, 9))
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        r = a.blocks()
    torch.testing.assert_close(r @ r.mT, torch.eye(4).expand(3, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 4}, "either r .* or oft_block_size .* got r=4, oft_block_size=32"),
        ({"oft_block_size": 0}, "got r=0, oft_block_size=0"),
        ({"oft_block_size": -4}, "oft_block_size must be a positive integer; got -4"),
        ({"module_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "'oft_only'; got 'lora_only'"),
        ({"num_cayley_neumann_terms": 1}, "at least 2"),
        ({"coft": True, "eps": 0}, "eps must be positive; got 0"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OFTConfig(**options)


def test_blocks_of_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of size 1 rotate nothing at 0, which has 6 features"):
        get_peft_model(nn.Sequential(nn.Linear(6, 5)), OFTConfig(r=6, oft_block_size=0, target_modules=["0"]))


OLD = {"peft_type": "OFT", "r": 4, "target_modules": ["0"], "block_share": False, "coft": False, "eps": 6e-5}
"""Fields that HF PEFT 0.13 wrote; 0.14 and 0.15 wrote oft_block_size, too, and 0.16 the series."""


def test_adapters_of_hf_peft_before_0_16_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no oft_block_size: HF PEFT before 0\.16 .* merge it with the version"):
        PeftConfig.from_dict(OLD, from_disk=True)
    config = OLD | {"oft_block_size": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.0.oft_r": torch.zeros(4, 3, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.oft_r; HF PEFT before 0\.16 computed OFT in another way"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 5)), tmp_path)


def test_the_series_of_hf_peft_before_0_18_is_warned_of() -> None:
    saved = OLD | {"oft_block_size": 0, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
    for version in (None, "0.17.1"):
        with pytest.warns(UserWarning, match="counted the last power of the Cayley-Neumann series twice"):
            PeftConfig.from_dict(saved | {"peft_version": version}, from_disk=True)
    for others in ({"peft_version": "0.18.0"}, {"peft_version": "1.0.0.dev0@abc"}, {"use_cayley_neumann": False}):
        PeftConfig.from_dict(saved | others, from_disk=True)
