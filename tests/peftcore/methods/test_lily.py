"""What the Lily paper says: neighbouring layers share A, all layers share the experts B, and a router mixes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore import ConfigError, MergeError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lily import LilyConfig

EXAMPLE = Example(
    LilyConfig,
    options={"r": 3},
    theirs="LilyConfig",
    parity={
        "plain": {"r": 4, "scaling": 0.5},
        "shared": {"r": 4, "stride_A": 2, "num_B": 3, "init_weights": False},
    },
    families=("llama", "bert"),
    merges=False,
    mixes_rows=True,
)


class Blocks(nn.Module):
    """Five blocks of two layers, of which the last one is wider."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(6, 6)] * 4 + [(6, 8)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(i, o), "down": nn.Linear(o, i)}) for i, o in widths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["down"](block["up"](x).tanh())  # type: ignore[index]
        return x


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LilyConfig(**{"r": 2, "target_modules": ["up", "down"], **options})
    return get_peft_model(Blocks().double(), config)


def layers(model: Any) -> dict[str, Any]:
    return dict(adapter_set(model).adapters("default"))


def numbers_of(model: Any, name: str, end: str) -> list[int]:
    """For each layer whose path has this end: the number of the first layer with the same parameter."""
    own = [id(getattr(layer, name)) for path, layer in layers(model).items() if path.endswith(end)]
    return [own.index(one) for one in own]


def test_the_papers_formula() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(7, 5)).double(), LilyConfig(r=2, num_B=3, scaling=0.7, target_modules=["0"])
    )
    randomise(model, 0.5)
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    adapter, base = layers(model)["0"], model[0].base_layer
    h = x @ adapter.lily_A.T
    probabilities = (h @ adapter.lily_router.T).softmax(-1).mean((0, 1))
    experts = adapter.lily_B.view(3, 2, 5)
    mixed = sum(p * expert for p, expert in zip(probabilities, experts, strict=True))
    torch.testing.assert_close(model(x), base(x) + 0.7 * h @ mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stride", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (3, [0, 0, 0, 3, 4]), (9, [0, 0, 0, 0, 4])]
)
def test_neighbours_of_one_name_and_shape_share_a_and_all_of_them_b(stride: int, expected: list[int]) -> None:
    model = net(stride_A=stride)
    for end in ("up", "down"):
        assert numbers_of(model, "lily_A", end) == expected
        assert numbers_of(model, "lily_B", end) == [0, 0, 0, 0, 4]
        assert numbers_of(model, "lily_router", end) == [0, 1, 2, 3, 4]
    assert len({id(layer.lily_B) for layer in layers(model).values()}) == 4


def test_a_regular_expression_is_one_name() -> None:
    model = net(target_modules=r".*\.(up|down)", stride_A=8)
    assert numbers_of(model, "lily_B", "") == [0] * 8 + [8, 9]
    assert numbers_of(model, "lily_A", "") == [0] * 8 + [8, 9]


def test_shared_tensors_train_once_and_count_once() -> None:
    model = net(stride_A=4, num_B=2, r=2)
    four, wide_up, wide_down = 2 * 6 + 4 * 6 + 4 * 4, 2 * 6 + 4 * 8 + 4, 2 * 8 + 4 * 6 + 4
    assert model.get_nb_trainable_parameters()[0] == 2 * four + wide_up + wide_down
    randomise(model, 0.3)
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert numbers_of(model, "lily_A", "up") == [0, 0, 0, 0, 4]


def test_directories_hold_shared_tensors_once_per_layer_and_are_read_as_shared(tmp_path: Path) -> None:
    model = net(stride_A=2)
    randomise(model, 0.5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 3 * 10
    first, second = (saved[f"base_model.model.blocks.{number}.up.lily_A.weight"] for number in (0, 1))
    assert torch.equal(first, second)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(x), expected)
    assert numbers_of(loaded, "lily_A", "up") == [0, 0, 2, 2, 4]


def test_what_the_router_chooses_depends_on_the_whole_batch() -> None:
    model = net()
    randomise(model, 0.3)
    x = torch.randn(2, 6, dtype=torch.float64)
    assert not torch.allclose(model(x)[:1], model(x[:1]))


def test_in_a_mixed_batch_the_rows_of_an_adapter_are_one_batch() -> None:
    model = net()
    randomise(model, 0.3)
    model.add_adapter("other", LilyConfig(r=3, target_modules=["up"], init_weights=False))
    x = torch.randn(5, 6, dtype=torch.float64)
    mixed = model(x, adapter_names=["default", "other", "__base__", "default", "other"])
    for name, rows in (("default", [0, 3]), ("other", [1, 4])):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], model(x[rows]), rtol=1e-10, atol=1e-10)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2:3], model(x[2:3]), rtol=1e-10, atol=1e-10)


def test_it_cannot_be_merged() -> None:
    model = net()
    with pytest.raises(MergeError, match="mixes its experts anew for each batch"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"stride_A": 0}, "stride_A must be a positive integer; got 0"),
        ({"num_B": 1}, "num_B must be at least 2, for the router to choose; got 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LilyConfig(**options)
