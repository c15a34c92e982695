"""KaSA: the paper's statements, parity with HF PEFT, and a base that comes back."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter, lora
from method_example import randomise
from torch import Tensor, nn

from peftcore import ConfigError, IA3Config, KasaConfig, LoraConfig, PeftModel, get_peft_model
from peftcore.methods.lora.variants.kasa import truncated

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"]}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 9, bias=False))


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 12)


def kasa(**options: Any) -> Any:
    return get_peft_model(net(), LoraConfig(**OPTIONS, kasa_config=KasaConfig(**options)))


def test_the_smallest_singular_values_are_removed() -> None:
    weight = torch.randn(9, 7)
    kept = torch.linalg.svdvals(weight)[:-2]
    torch.testing.assert_close(torch.linalg.svdvals(truncated(weight, 2)), torch.cat([kept, torch.zeros(2)]))


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_the_truncated_weight_and_b_diag_a(bias: bool) -> None:
    model = lora(net(), r=3, kasa_config={}, lora_dropout=0.5, lora_bias=bias)
    randomise(model, 0.3)
    part, x = adapter(model), inputs()
    original = net()[0]
    change = part.scaling * part.lora_B_weight @ torch.diag(part.lora_diag) @ part.lora_A_weight
    weight = truncated(original.weight, 3) + change
    shift = original.bias + (part.scaling * part.lora_bias if bias else 0)
    torch.testing.assert_close(model.eval()[0](x), x @ weight.T + shift)
    torch.testing.assert_close(part.delta_weight(), change)


def test_a_disabled_adapter_shows_the_truncated_base_and_a_deleted_one_gives_it_back() -> None:
    original, x = net(), inputs()
    cut = copy.deepcopy(original)
    with torch.no_grad():
        for layer in (cut[0], cut[2]):
            layer.weight.copy_(truncated(layer.weight, 3))
    model = kasa()
    torch.testing.assert_close(model(x), cut(x))  # B starts at zero
    randomise(model, 0.3)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), cut(x))
    model.delete_adapter("default")
    assert torch.equal(model(x), original(x))


def test_outputs_gradients_and_regulariser_are_pefts(tmp_path: Path) -> None:
    weights = {"beta": 0.3, "gamma": 0.2}
    theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(**OPTIONS, kasa_config=peft.KasaConfig(**weights)))
    randomise(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = PeftModel.from_pretrained(net(), tmp_path / "theirs", is_trainable=True)
    assert ours.peft_config["default"].kasa_config.beta == 0.3
    x = inputs()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours._get_kasa_loss(), theirs._get_kasa_loss(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.adapter_regularizer(), ours.base_model._get_kasa_loss("default"))
    for model in (ours, theirs):
        (model(x).square().sum() + model._get_kasa_loss()).backward()
    layer = theirs.base_model.model[0]
    torch.testing.assert_close(adapter(ours).lora_diag.grad, layer.lora_diag["default"].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        adapter(ours).lora_A_weight.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4
    )
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(again(x), ours(x), rtol=1e-5, atol=1e-5)


def test_without_kasa_the_loss_is_zero() -> None:
    assert lora(net())._get_kasa_loss() == 0.0


def test_merging_and_a_second_adapter() -> None:
    model, x = kasa(), inputs()
    randomise(model, 0.3)
    alone = model(x)
    model.add_adapter("second", LoraConfig(**OPTIONS, kasa_config=KasaConfig()))
    torch.testing.assert_close(model(x), alone)  # both need the same truncated weight
    model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x), alone)  # the second one adds nothing yet
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), alone)


def test_no_plain_lora_equals_it() -> None:
    assert kasa().supports_lora_conversion() is False
    assert lora(net()).supports_lora_conversion() is True


@pytest.mark.parametrize("other", [LoraConfig(r=2, target_modules=["0"]), IA3Config(target_modules=["0"])])
@pytest.mark.parametrize("first", [True, False])
def test_adapters_without_kasa_are_refused_beside_it(other: Any, first: bool) -> None:
    own = LoraConfig(**OPTIONS, kasa_config=KasaConfig())
    model = get_peft_model(net(), own if first else other)
    before = model(inputs())
    with pytest.raises(ConfigError, match="KaSA cannot be combined with adapters that don't use KaSA"):
        model.add_adapter("second", other if first else own)
    assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kasa_config": {"beta": -1.0}}, "`beta` must be non-negative"),
        ({"kasa_config": {"gama": 1.0}}, "did you mean 'gamma'"),
        ({"kasa_config": 3}, "kasa_config must be a dictionary or None; got 3"),
        ({"kasa_config": {}, "use_dora": True}, "exclude each other"),
        ({"kasa_config": {}, "init_lora_weights": "pissa"}, "both change the base weight"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraConfig(**options)


def test_the_rank_leaves_a_singular_value() -> None:
    with pytest.raises(ConfigError, match=r"KaSA requires `r` to be smaller than .* 0, which is 8; got 8"):
        lora(net(), r=8, kasa_config={})
