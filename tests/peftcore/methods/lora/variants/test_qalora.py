"""QA-LoRA: the mean of each group, parity with HF PEFT's variant, and the merged weight that HF PEFT does not have."""

from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter
from method_example import randomise
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

from peftcore import ConfigError, LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], "use_qalora": True, "qalora_group_size": 4}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8))


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 12)


def test_a_sees_the_means_of_groups() -> None:
    model, x = get_peft_model(net(), LoraConfig(**OPTIONS)), inputs()
    randomise(model, 0.3)
    part = adapter(model)
    assert part.lora_A_weight.shape == (3, 3)
    means = x.view(2, 5, 3, 4).mean(-1) * 3
    adapted = net()(x) + part.scaling * means @ part.lora_A_weight.T @ part.lora_B_weight.T
    torch.testing.assert_close(model(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


def test_merging_shifts_each_group_by_one_number() -> None:
    model = get_peft_model(net(), LoraConfig(**OPTIONS))
    randomise(model, 0.3)
    groups = adapter(model).delta_weight().view(8, 3, 4)
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups))


def test_start_and_outputs_are_those_of_pefts_variant(tmp_path: Any) -> None:
    """HF PEFT uses its variant on GPTQ layers only, so the test puts it on a plain layer by hand."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**OPTIONS)
    theirs: Any = peft.get_peft_model(net(), config)
    layer = theirs.base_model.model[0]
    QALoraLinearVariant.init(layer, "default", config)
    layer.lora_variant["default"] = QALoraLinearVariant()
    following = torch.rand(1)
    torch.manual_seed(3)
    ours: Any = get_peft_model(net(), LoraConfig(**OPTIONS))
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(adapter(ours).lora_A_weight, layer.lora_A["default"].weight)
    randomise(theirs, 0.3)
    theirs.save_pretrained(tmp_path)
    x = inputs()
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_inputs_must_fill_their_groups() -> None:
    with pytest.raises(ConfigError, match="0 has 12 inputs, which is not divisible by qalora_group_size=5"):
        get_peft_model(net(), LoraConfig(**{**OPTIONS, "qalora_group_size": 5}))
    with pytest.raises(ConfigError, match="qalora_group_size must be a positive integer"):
        LoraConfig(use_qalora=True, qalora_group_size=0)


def test_a_group_size_without_qalora_warns() -> None:
    with pytest.warns(UserWarning, match="qalora_group_size has no effect"):
        LoraConfig(qalora_group_size=4)
