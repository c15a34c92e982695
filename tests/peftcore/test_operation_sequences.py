"""After any sequence of operations a model computes what a newly built model with the same adapters computes.

The reference has no history: it is built for each question from the base's own weights and the adapters' tensors, and
runs one adapter after another with gradients recorded. So it shares no cache, stack or merged weight with the model
that is tested. Everything is in float64.

Sixty sequences by default; PEFTCORE_SEQUENCES=10000 runs that many, other ones each time.
"""

import contextlib
import copy
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from method_example import examples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore import LoraConfig, MergeError, PeftConfig, RoutingError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods
from peftcore.storage.adapter_state import adapter_state_of
from peftcore.train.adamw import FusedAdamW

SEQUENCES = int(os.environ.get("PEFTCORE_SEQUENCES", "0"))
"""How many sequences; 0: a few, the same ones in each run."""
STEPS = 12
"""Operations in a sequence, at most."""
NAMES = ("a", "b", "c")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WITH_BIAS = ["q_proj", "k_proj", "o_proj"]
ROWS = 4

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    name: (lambda example=example: example.make("", target_modules=WITH_BIAS if example.needs_bias else TARGETS))
    for name, example in examples().items()
    if "linear" in methods()[name].adapter.layer_kinds
    and not (example.whole_model or example.inputs or example.mixes_rows)
    and name != "TRAINABLE_TOKENS"  # two adapters that train one row exclude each other
} | {
    "rsLoRA": lambda: LoraConfig(r=3, use_rslora=True, target_modules=TARGETS),
    "DoRA": lambda: LoraConfig(r=3, use_dora=True, target_modules=TARGETS),
    "LoRA with bias": lambda: LoraConfig(r=3, lora_bias=True, target_modules=WITH_BIAS),
    "LoRA with dropout": lambda: LoraConfig(r=3, lora_dropout=0.3, target_modules=TARGETS),
    "LoRA of two layers": lambda: LoraConfig(r=2, rank_pattern={"v_proj": 4}, target_modules=["q_proj", "v_proj"]),
    "LoRA with trained biases": lambda: LoraConfig(r=2, bias="lora_only", target_modules=["q_proj", "v_proj"]),
    "DoRA with trained biases": lambda: LoraConfig(r=2, bias="lora_only", use_dora=True, target_modules=TARGETS),
    "LoRA with a whole module": lambda: LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["head"]),
}
MERGES = {name for name in CONFIGS if name not in examples() or examples()[name].merges}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "FusedAdamW": lambda p: FusedAdamW(p, lr=0.05),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


class Block(nn.Module):
    """Three layers that read one input, and one that reads what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8, bias=False)
        self.o_proj = nn.Linear(12, 8)

    def forward(self, h: Tensor) -> Tensor:
        mixed = self.q_proj(h).tanh() * self.k_proj(h) + self.v_proj(h)
        out = self.o_proj(torch.cat([mixed, h[..., 8:]], -1))
        return torch.cat([out, h[..., :4]], -1).tanh()


class Net(nn.Module):
    """Two blocks, recomputed in the backward where asked, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 5)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)  # type: ignore[assignment]
        return self.head(x)


def new_base() -> Net:
    torch.manual_seed(0)
    return Net().double()


def inputs(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def names_of(count: int = len(NAMES)) -> Any:
    return st.lists(st.sampled_from(NAMES), unique=True, max_size=count)


SEEDS = st.integers(0, 3)


class Operations(RuleBasedStateMachine):
    """The model under test, and what it has to compute: base weights, adapters, which are active, which merged."""

    @initialize(kind=st.sampled_from(sorted(CONFIGS)))
    def begin(self, kind: str) -> None:
        self.base = new_base().state_dict()
        self.active: list[str] = []
        self.merged: list[str] = []
        self.kinds: dict[str, str] = {}
        self.net = get_peft_model(new_base(), CONFIGS[kind](), "a")
        self.kinds["a"] = kind
        self.active = ["a"]
        self._move("a", 1)
        self.net.eval()

    # -- the reference -------------------------------------------------------------------------------------------

    def _adapted(self, chain: list[str]) -> Any:
        """A new model with these adapters, active in this order."""
        net = new_base()
        net.load_state_dict(self.base)
        for name in chain:
            net = get_peft_model(net, CONFIGS[self.kinds[name]](), name)
        live = adapter_set(self.net)
        for name in chain:
            own = adapter_set(net)
            adapter_state_of(own, name).read(adapter_state_of(live, name).tensors())
            for path, adapter in own.adapters(name).items():
                if "scaling" in vars(adapter):
                    adapter.scaling = live.adapters(name)[path].scaling
        if chain:
            net.set_adapter(chain)
            net.set_requires_grad(chain, True)
        return net.eval()

    def _expected(self, x: Tensor, chain: list[str]) -> Tensor:
        with torch.enable_grad():
            return self._adapted(chain)(x).detach()

    def _chain(self) -> list[str]:
        """Adapters in the order in which they act: merged ones stand below the others."""
        return self.merged + [name for name in self.active if name not in self.merged]

    def _same(self, actual: Tensor, expected: Tensor, what: str) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")

    @torch.no_grad()
    def _move(self, name: str, seed: int) -> None:
        """Move an adapter's parameters away from their start, in place."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_set(self.net).parameters(name):
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))

    # -- adapters ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.kinds) < len(NAMES))
    @rule(kind=st.sampled_from(sorted(CONFIGS)), seed=SEEDS)
    def add(self, kind: str, seed: int) -> None:
        name = next(name for name in NAMES if name not in self.kinds)
        if self.merged:  # a method may read the base's weight when it starts
            return
        self.net.add_adapter(name, CONFIGS[kind]())
        self.kinds[name] = kind
        self._move(name, seed)
        self.net.eval()  # what trains drops at once

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if name not in self.kinds or len(self.kinds) == 1:
            return
        if name in self.merged:
            with pytest.raises(MergeError):
                self.net.delete_adapter(name)
            return
        del self.kinds[name]
        if self.active == [name]:
            self.active = [next(iter(self.kinds))]
            with pytest.warns(UserWarning, match=f"{self.active[0]!r} is the active one now"):
                self.net.delete_adapter(name)
        else:
            self.active = [other for other in self.active if other != name]
            self.net.delete_adapter(name)

    @rule(names=names_of())
    def activate(self, names: list[str]) -> None:
        chosen = [name for name in names if name in self.kinds]
        with pytest.warns(UserWarning, match="are unmerged now") if self.merged else contextlib.nullcontext():
            self.net.set_adapter(chosen)
        self.active, self.merged = chosen, []

    @precondition(lambda self: len(self.kinds) < len(NAMES))
    @rule(name=st.sampled_from(NAMES))
    def save_and_load(self, name: str) -> None:
        if name not in self.kinds or self.merged:
            return
        other = next(other for other in NAMES if other not in self.kinds)
        with TemporaryDirectory() as folder:
            self.net.save_pretrained(folder, selected_adapters=[name])
            directory = Path(folder) if name == "default" else Path(folder) / name
            self.net.load_adapter(directory, other)
        self.kinds[other] = self.kinds[name]

    # -- merging -------------------------------------------------------------------------------------------------

    @rule(names=names_of())
    def merge(self, names: list[str]) -> None:
        chosen = [name for name in names if name in self.kinds]
        if not all(self.kinds[name] in MERGES for name in chosen):
            with pytest.raises(MergeError):
                self.net.merge_adapter(chosen)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged|Already following adapters")
            self.net.merge_adapter(chosen)
        self.merged += [name for name in chosen if name not in self.merged]

    @rule()
    def unmerge(self) -> None:
        if adapter_set(self.net).merged:
            self.net.unmerge_adapter()
        self.merged = []

    # -- changes of weights ----------------------------------------------------------------------------------------

    @rule(optimizer=st.sampled_from(sorted(OPTIMIZERS)), seed=SEEDS, recompute=st.booleans(), steps=st.integers(1, 2))
    def train(self, optimizer: str, seed: int, recompute: bool, steps: int) -> None:
        acting = [name for name in self.active if name not in self.merged]
        parameters = [p for name in acting for p in adapter_set(self.net).parameters(name)]
        if not parameters or self.merged:
            return
        self.net.set_requires_grad(acting, True)
        self.net.recompute = recompute
        made = OPTIMIZERS[optimizer](parameters)
        for _ in range(steps):
            self.net(inputs(seed)).square().mean().backward()
            made.step()
            made.zero_grad()
        self.net.recompute = False

    @rule(name=st.sampled_from(NAMES), seed=SEEDS, how=st.sampled_from(["in place", "new tensors", "load", "assign"]))
    def change(self, name: str, seed: int, how: str) -> None:
        if name not in self.kinds or name in self.merged:
            return
        if how == "in place":
            self._move(name, seed)
            return
        for adapter in adapter_set(self.net).adapters(name).values():
            state = {
                key: value * 1.01 if value.is_floating_point() else value for key, value in adapter.state_dict().items()
            }
            if how == "new tensors":
                for key, value in list(adapter._parameters.items()):
                    if value is not None:
                        adapter._parameters[key] = nn.Parameter(value.detach() * 1.02, value.requires_grad)
            else:
                adapter.load_state_dict(state, assign=how == "assign")

    @rule(name=st.sampled_from(NAMES), factor=st.sampled_from([0.5, 3.0]))
    def rescale(self, name: str, factor: float) -> None:
        if name not in self.kinds or name in self.merged:
            return
        for adapter in adapter_set(self.net).adapters(name).values():
            if isinstance(vars(adapter).get("scaling"), float):
                adapter.scaling *= factor

    @rule(name=st.sampled_from(NAMES), trains=st.booleans())
    def freeze(self, name: str, trains: bool) -> None:
        if name in self.kinds:
            self.net.set_requires_grad(name, trains)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "to", "eval"]))
    def copy(self, how: str) -> None:
        if how == "deepcopy":
            self.net = copy.deepcopy(self.net)
        elif how == "pickle":
            self.net = pickle.loads(pickle.dumps(self.net))
        elif how == "to":
            self.net.to(torch.float64)
        else:
            self.net.train().eval()

    # -- questions -------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, mode=st.sampled_from(["grad", "no_grad", "inference"]), repeats=st.integers(1, 2))
    def forward(self, seed: int, mode: str, repeats: int) -> None:
        if any(self.kinds[name] == "LoRA with a whole module" for name in self.merged if name not in self.active):
            return  # HF PEFT too: the copy of the active adapter acts, whatever is merged (test_saved_module.py)
        x, expected = inputs(seed), self._expected(inputs(seed), self._chain())
        context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        for _ in range(repeats):
            with context():
                actual = self.net(x.clone())
            self._same(actual.detach().clone(), expected, f"{mode} of {self._chain()}")

    @rule(seed=SEEDS)
    def disabled(self, seed: int) -> None:
        with self.net.disable_adapter(), torch.no_grad():
            actual = self.net(inputs(seed))
        self._same(actual, self._expected(inputs(seed), []), "disabled")

    @rule(seed=SEEDS, rows=st.lists(st.sampled_from([None, *NAMES]), min_size=ROWS, max_size=ROWS), grad=st.booleans())
    def routed_rows(self, seed: int, rows: list[str | None], grad: bool) -> None:
        chosen = [name if name in self.kinds else None for name in rows]
        x = inputs(seed)
        if self.merged:
            with pytest.raises(RoutingError):
                self.net(x, adapter_names=chosen)
            return
        with torch.set_grad_enabled(grad):
            actual = self.net(x, adapter_names=chosen).detach()
        for number, name in enumerate(chosen):
            expected = self._expected(x[number : number + 1], [] if name is None else [name])
            self._same(actual[number : number + 1], expected, f"row {number} of {chosen}")

    @rule(seed=SEEDS, weights=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.25, 0.5, -0.5]), min_size=1))
    def mixture(self, seed: int, weights: dict[str, float]) -> None:
        chosen = {name: weight for name, weight in weights.items() if name in self.kinds}
        whole = any(self.kinds[name] == "LoRA with a whole module" for name in chosen)
        if self.merged or not chosen or (whole and len(chosen) > 1):
            return
        with torch.no_grad():
            actual = self.net(inputs(seed), adapter_names=chosen)
        with torch.enable_grad():
            expected = self._adapted(list(chosen))(inputs(seed), adapter_names=chosen).detach()
        self._same(actual, expected, f"mixture {chosen}")

    @rule(seed=SEEDS, first=st.sampled_from(NAMES), second=st.sampled_from(NAMES), recompute=st.booleans())
    def gradients(self, seed: int, first: str, second: str, recompute: bool) -> None:
        """Two forwards with different routes before one backward."""
        if self.merged or first not in self.kinds or second not in self.kinds:
            return
        self.net.set_requires_grad([*dict.fromkeys((first, second))], True)
        self.net.zero_grad()
        self.net.recompute = recompute
        losses = [self.net(inputs(seed), adapter_names=name).square().mean() for name in (first, second)]
        torch.stack(losses).sum().backward()
        self.net.recompute = False
        expected: dict[tuple[str, str, str], Tensor] = {}
        for name in (first, second):
            net = self._adapted([name])
            net(inputs(seed)).square().mean().backward()
            for path, adapter in adapter_set(net).adapters(name).items():
                for key, parameter in adapter.named_parameters():
                    if parameter.grad is not None:
                        place = (name, path, key)
                        expected[place] = expected[place] + parameter.grad if place in expected else parameter.grad
        for (name, path, key), gradient in expected.items():
            own = dict(adapter_set(self.net).adapters(name)[path].named_parameters())[key].grad
            assert own is not None, f"no gradient for {path}.{key} of {name}"
            self._same(own, gradient, f"gradient of {path}.{key} of {name}")
        self.net.zero_grad()

    @invariant()
    def what_acts_and_is_merged_is_known(self) -> None:
        if hasattr(self, "net"):
            assert set(adapter_set(self.net).merged) == set(self.merged)
            assert list(self.net.active_adapters) == self.active

    def teardown(self) -> None:
        if not hasattr(self, "net"):
            return
        plain = self.net.unload()
        for key, value in plain.state_dict().items():
            assert torch.equal(value, self.base[key]), f"unload left another {key}"


def test_any_sequence_of_operations_computes_what_a_new_model_does() -> None:
    run_state_machine_as_test(
        Operations,
        settings=settings(
            max_examples=SEQUENCES or 60,
            stateful_step_count=STEPS,
            derandomize=not SEQUENCES,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
