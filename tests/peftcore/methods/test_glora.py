"""What the GLoRA paper says: five support tensors change the weight and the bias of a layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.methods.glora import GloraConfig

VECTORS: dict[str, Any] = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
EXAMPLE = Example(
    GloraConfig,
    options={"r": 3},
    theirs="GloraConfig",
    parity={
        "factors": {"r": 4},
        "vectors": VECTORS,
        "numbers": {"config_A_B": "constant", "config_C": "none"},
        "of the bias": {"config_A_B": "constant", "bias": "glora_only"},
        "of the weight": {"config_C": "none", "config_D_E": "none", "init_weights": False},
    },
    families=("llama", "bert"),
    spread=0.2,
)
X = torch.linspace(-1, 1, 21, dtype=torch.float64).view(3, 7)


def net(has_bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(7, 5, bias=has_bias)).double(), GloraConfig(target_modules=["0"], **options)
    )
    randomise(model, 0.5)
    return model


def value(adapter: Any, name: str) -> Tensor:
    """A to E as the paper writes them, from the parameters."""
    parameters = dict(getattr(adapter, f"glora_{name}").named_parameters())
    if "X" in parameters:
        return parameters["X"]
    return parameters["Xd"] @ parameters["Xu"] if parameters else torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("a_b", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("c", ["lora", "vector", "none"])
@pytest.mark.parametrize("d_e", ["vector", "constant", "none"])
def test_the_papers_formula(a_b: str, c: str, d_e: str) -> None:
    model = net(r=2, config_A_B=a_b, config_C=c, config_D_E=d_e)
    adapter, base = model[0].adapters["default"], model[0].base_layer
    a, b, c_, d, e = (value(adapter, name) for name in "ABCDE")
    weight = base.weight + base.weight * a + b
    bias = base.bias + base.bias * d + e + (base.weight @ c_)[:, 0] if c != "none" else base.bias + base.bias * d + e
    torch.testing.assert_close(model(X), X @ weight.T + bias, rtol=1e-12, atol=1e-12)
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(base.weight, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_several_adapters_all_change_the_own_weight_of_the_base() -> None:
    """As in PEFT, the result does not depend on their order, and none scales what another one adds."""
    model = net(r=2)
    alone = model(X) - model[0].base_layer(X)
    model.add_adapter("other", GloraConfig(target_modules=["0"], **VECTORS))
    model.set_requires_grad("other")
    model.set_requires_grad("default", False)
    randomise(model, 0.5, seed=4)
    model.set_adapter("other")
    other = model(X) - model[0].base_layer(X)
    base = model[0].base_layer(X)
    for order in (["default", "other"], ["other", "default"]):
        model.set_adapter(order)
        torch.testing.assert_close(model(X), base + alone + other, rtol=1e-12, atol=1e-12)
        model.merge_adapter()
        torch.testing.assert_close(model(X), base + alone + other, rtol=1e-12, atol=1e-12)
        model.unmerge_adapter()


def test_a_layer_without_a_bias_has_two_terms() -> None:
    names = {name.split(".")[1] for name, _ in net(has_bias=False).named_parameters() if "glora" in name}
    assert names == {"glora_A", "glora_B"}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"r": 2}, 2 * 2 * (5 + 7) + 2 * (7 + 1) + 2),
        (VECTORS, 2 * 5 + 7 + 2 * 5),
        ({"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}, 2),
    ],
)
def test_number_of_parameters(options: dict[str, Any], count: int) -> None:
    assert net(**options).get_nb_trainable_parameters()[0] == count


def test_a_trained_bias_is_the_one_that_d_scales() -> None:
    model = net(config_A_B="none", config_C="none", config_D_E="vector", bias="glora_only")
    adapter = model[0].adapters["default"]
    bias = adapter.trained_bias.bias
    expected = X @ model[0].base_layer.weight.T + bias + bias * adapter.glora_D.X + adapter.glora_E.X
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_zeros_of_absent_terms_are_read_with_and_without_those_of_matrices(tmp_path: Path) -> None:
    model = net(has_bias=False, config_A_B="none")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "base_model.model.0.glora_C.zeros": (7, 1),
        "base_model.model.0.glora_D.zeros": (5,),
        "base_model.model.0.glora_E.zeros": (5,),
    }
    (tmp_path / "SHA256SUMS").unlink()
    save_file(tensors | {f"base_model.model.0.glora_{name}.zeros": torch.zeros(5, 7) for name in "AB"}, file)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"config_A_B": "other"}, "'none'; got 'other'"),
        ({"config_C": "constant"}, "'none'; got 'constant'"),
        ({"config_D_E": "lora"}, "'none'; got 'lora'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GloraConfig(**options)
