"""KappaTune: the targets are those of HF PEFT, on linear layers and experts."""

from typing import Any

import peft
import peft.helpers
import pytest
import torch
from torch import nn

import peftcore
from peftcore import ConfigError
from peftcore.hf_peft.helpers import KappaTuneSelector


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 4))
        self.other = nn.Parameter(torch.randn(3, 6, 4))


def net() -> Any:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {f"layer{number}": nn.Linear(6, 6 + number) for number in range(5)}
    return nn.ModuleDict({**layers, "wide": nn.Linear(40, 6), "experts": Experts(), "norm": nn.LayerNorm(6)})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.5},
        {"top_p": 1.0, "max_dim_size_to_analyze": 20},
        {"top_p": 1.0, "max_dim_size_to_analyze": 7},
        {"top_p": 1.0, "moe_param_suffixes": (".other",)},
    ],
)
def test_the_targets_are_those_of_peft(options: dict[str, Any]) -> None:
    ours, theirs = (
        library.find_kappa_target_modules(net(), show_progress=False, **options) for library in (peftcore, peft)
    )
    assert ours == theirs


@pytest.mark.parametrize("options", [{}, {"num_modules": 2, "top_p": 0.9}, {"num_modules": 99}, {"threshold": 20.0}])
def test_a_selector_answers_like_that_of_peft(options: dict[str, Any]) -> None:
    ours, theirs = (kind(net(), show_progress=False) for kind in (KappaTuneSelector, peft.helpers.KappaTuneSelector))
    for _ in range(2):
        assert ours.get_best_targets(**options) == theirs.get_best_targets(**options)
        assert ours.get_best_target_parameters(**options) == theirs.get_best_target_parameters(**options)


def test_a_share_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="top_p must be above 0 and at most 1; got 20"):
        peftcore.find_kappa_target_modules(net(), 20)
    assert "condition numbers" in capsys.readouterr().err
