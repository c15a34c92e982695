"""Small models in float64 with adapters that have been moved at random, and their changes read by another way."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft  # noqa: F401


class Kinds(nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(12, 8)
        self.turned = Conv1D(8, 12)
        self.line = nn.Conv1d(6, 8, 3)
        self.point = nn.Conv2d(6, 8, 1)
        self.plane = nn.Conv2d(6, 8, 3)
        self.space = nn.Conv3d(4, 8, 2)


KINDS = ["embedding", "linear", "turned", "line", "point", "plane", "space"]


@pytest.fixture
def kinds() -> Callable[[], Any]:
    """Makes a module with one layer of each kind, in float64, always the same."""

    def make() -> Any:
        torch.manual_seed(0)
        return Kinds().double()

    return make


@pytest.fixture
def llama() -> Callable[[], Any]:
    """Makes a tiny Llama in float64, always the same."""

    def make(**options: Any) -> Any:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
        config = LlamaConfig(**{**shape, "num_attention_heads": 2, "num_key_value_heads": 1, **options})
        return LlamaForCausalLM(config).double().eval()

    return make


@pytest.fixture
def with_adapters() -> Callable[..., Any]:
    """Gives a model adapters by name and moves all their parameters at random."""

    def make(model: nn.Module, **configs: Any) -> Any:
        first, *others = configs
        model = get_peft_model(model, configs[first], first)
        for name in others:
            model.add_adapter(name, configs[name])
        torch.manual_seed(1)
        with torch.no_grad():
            for name in configs:
                for adapter in adapter_set(model).adapters(name).values():
                    for parameter in adapter.parameters():
                        parameter += 0.3 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def linears(with_adapters: Callable[..., Any]) -> Callable[..., Any]:
    """Two linear layers of 12 to 8 and 8 to 12 in float64, with LoRA of rank 4 by name; {name: options that differ}."""

    def make(**options: Mapping[str, Any]) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)).double()
        given = {name: {"r": 4, "target_modules": ["0", "1"], **own} for name, own in options.items()}
        return with_adapters(net, **{name: LoraConfig(**own) for name, own in given.items()})

    return make


@pytest.fixture
def changes() -> Callable[[Any, str], dict[str, Tensor]]:
    """{path: W' − W (canonical)} of one adapter, as a merge would write it."""

    def read(model: Any, name: str) -> dict[str, Tensor]:
        found = {}
        with torch.no_grad():
            for path, adapter in adapter_set(model).adapters(name).items():
                weight = adapter.base.read_unmerged().double()
                found[path] = adapter.merged_weight(weight) - weight
        return found

    return read


@pytest.fixture
def snapshot() -> Callable[[Any], tuple[Any, ...]]:
    """All that an operation on adapters could change in a model, to compare."""

    def take(model: Any) -> tuple[Any, ...]:
        adapters = adapter_set(model)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        names = [name for name, _ in model.named_modules()]
        return list(adapters.configs), adapters.selection.active, names, list(state), list(state.values())

    return take


@pytest.fixture
def refused(snapshot: Any) -> Callable[..., None]:
    """Checks that a call raises an error with a message, and leaves the model unchanged."""

    def check(model: Any, kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
        before = snapshot(model)
        with pytest.raises(kind, match=message):
            call()
        after = snapshot(model)
        assert before[:-1] == after[:-1] and all(map(torch.equal, before[-1], after[-1]))

    return check


@pytest.fixture
def model(linears: Any) -> Any:
    return linears(a={"lora_alpha": 6}, b={"r": 3, "use_rslora": True}, c={"r": 2})
