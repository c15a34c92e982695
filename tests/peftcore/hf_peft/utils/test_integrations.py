"""The weights of layers without their quantisation, as HF PEFT reads them, and contexts that scripts import."""

import copy

import peft.utils.integrations as theirs
import pytest
import torch
from peftcore.utils import integrations as ours
from torch import nn

from peftcore import ConfigError, TargetError

bnb = pytest.importorskip("bitsandbytes")


def four_bits() -> nn.Module:
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def eight_bits() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(32, 64), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    layer(torch.randn(1, 64))  # the first call moves the scales into its state
    return layer


@pytest.mark.filterwarnings("ignore")  # bitsandbytes': a cast of the input to float16
@pytest.mark.parametrize("layer_of", [four_bits, eight_bits], ids=["4bit", "8bit"])
def test_a_quantised_weight_is_read_as_by_hf_peft(layer_of: object) -> None:
    torch.manual_seed(0)
    layer = layer_of()  # type: ignore[operator]
    expected = theirs.dequantize_module_weight(copy.deepcopy(layer)).float()
    torch.testing.assert_close(ours.dequantize_module_weight(layer).float(), expected)
    state = getattr(layer, "state", None)
    torch.testing.assert_close(ours.dequantize_bnb_weight(layer.weight, state).float(), expected)
    assert ours.get_bnb_param_type(layer.weight) == theirs.get_bnb_param_type(layer.weight) is not False


def test_a_plain_weight_is_the_parameter_itself() -> None:
    layer = nn.Linear(2, 3)
    assert ours.dequantize_module_weight(layer) is layer.weight
    assert ours.get_bnb_param_type(layer.weight) is False
    with pytest.raises(ConfigError, match=r"got Parameter; try dequantize_module_weight\(layer\)"):
        ours.dequantize_bnb_weight(layer.weight)
    with pytest.raises(TargetError, match="ReLU is a ReLU, which cannot be adapted"):
        ours.dequantize_module_weight(nn.ReLU())


def test_without_deepspeed_parameters_are_whole_already() -> None:
    assert not ours.check_deepspeed_zero3_enabled()
    layer = nn.Linear(2, 3)
    with ours.gather_params_ctx(layer.weight), ours.gather_params_ctx([layer.weight], fwd_module=layer):
        assert layer.weight.shape == (3, 2)


def test_modules_are_made_without_memory() -> None:
    with ours.init_empty_weights():
        norm = nn.BatchNorm1d(2)
    assert norm.weight.is_meta and not norm.running_mean.is_meta  # type: ignore[union-attr]
    with ours.init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(2).running_mean.is_meta  # type: ignore[union-attr]


def test_a_function_makes_modules_with_memory_inside_of_the_context() -> None:
    for module in (theirs, ours):

        @module.skip_init_on_device
        def made(size: int, affine: bool = True) -> nn.Module:
            return nn.BatchNorm1d(size, affine=affine)

        with module.init_empty_weights():
            norm = made(2, affine=True)
            assert nn.BatchNorm1d(2).weight.is_meta  # type: ignore[union-attr]
        assert not norm.weight.is_meta and made.__name__ == "made"  # type: ignore[union-attr]
        assert not nn.BatchNorm1d(2).weight.is_meta  # type: ignore[union-attr]
