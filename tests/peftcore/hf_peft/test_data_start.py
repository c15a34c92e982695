import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore import ConfigError, LoraConfig, get_peft_model, initialize_lora_eva_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def eva() -> nn.Module:
    return get_peft_model(Model(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights="eva"))


def test_eva_starts_from_batches() -> None:
    torch.manual_seed(0)
    model, before = eva(), None
    before = model.layer.lora_A["default"].weight.clone()  # type: ignore[union-attr]
    initialize_lora_eva_weights(model, [{"x": torch.randn(64, 6)}], show_progress_bar=False)
    assert not torch.equal(model.layer.lora_A["default"].weight, before)  # type: ignore[union-attr]


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(ConfigError, match="eva_state_dict must be None"):
        initialize_lora_eva_weights(eva(), eva_state_dict={"layer": torch.ones(1)})
    with pytest.raises(ConfigError, match="give batches"):
        initialize_lora_eva_weights(eva())


def test_labels_are_shifted_as_in_peft() -> None:
    labels = torch.tensor([[5, -100, 7], [1, 2, -100]])
    ours, theirs = (library.shift_tokens_right(labels.clone(), 0, 3) for library in (peftcore, peft))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        peftcore.shift_tokens_right(labels, None, 3)  # type: ignore[arg-type]
