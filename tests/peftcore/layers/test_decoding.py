"""Few tokens of one chain of adapters, without gradients: the numbers of the general path, whatever changes."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_example import randomise
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from peftcore import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from peftcore._util.fingerprint import unchanging_weights
from peftcore.compiled import low_rank as compiled_low_rank
from peftcore.compiled import low_rank_of_prompts
from peftcore.layers import adapter_layer, decoding, decoding_by_row
from peftcore.layers.decoding import FEW_TOKENS, MOST_TOKENS, decoded


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["0", "1"], **options})


def adapted(config: Any, bias: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)).to(dtype)
    model: Any = get_peft_model(net, config).eval()
    randomise(model, 0.3)
    return model


def general(model: Any, x: Tensor) -> Tensor:
    """The output by the general path: an empty hook on the base layers keeps all others away."""
    layers = [getattr(layer, "base_layer", layer) for layer in (model[0], model[1])]
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in layers]
    y = model(x)
    for hook in hooks:
        hook.remove()
    return y


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer took this path."""
    seen: list[bool] = []

    def noted(layer: Any, x: Tensor) -> Tensor | None:
        y = decoded(layer, x)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(adapter_layer, "decoded", noted)
    return seen


X = torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8)
LAYERS = {"target_modules": ["0", "1"]}
METHODS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, **LAYERS),
    "ia3": IA3Config(feedforward_modules=["1"], **LAYERS),
    "vera": VeraConfig(r=4, **LAYERS),
    "fourierft": FourierFTConfig(n_frequency=9, **LAYERS),
    "boft": BOFTConfig(boft_block_size=4, **LAYERS),
    "oft": OFTConfig(oft_block_size=4, r=0, **LAYERS),
}


@pytest.mark.parametrize("shape", [(8,), (1, 8), (FEW_TOKENS, 8), (FEW_TOKENS + 1, 8), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_equals_the_general_path(name: str, bias: bool, shape: tuple[int, ...], taken: list[bool]) -> None:
    model, x = adapted(METHODS[name], bias), torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        quick = model(x)
        few = 0 < x.numel() <= FEW_TOKENS * 8
        assert taken == [few, few]
        torch.testing.assert_close(quick, general(model, x), atol=1e-12, rtol=0)


MANY = FEW_TOKENS + 8
OF_FACTORS = ("lora", "rslora", "dora", "adalora")
TOLERANCES = {torch.float64: {"atol": 1e-12, "rtol": 0.0}, torch.float32: {"atol": 2e-5, "rtol": 1e-6}}


@pytest.mark.skipif(not compiled_low_rank.compiled(), reason="nothing is compiled here; the log says why")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_many_tokens_with_factors_equal_the_general_path(name: str, dtype: torch.dtype, taken: list[bool]) -> None:
    if dtype is torch.bfloat16 and not low_rank_of_prompts.compiled():
        pytest.skip("there is no compiled code for this processor")
    model, x = adapted(METHODS[name], dtype=dtype), torch.randn(2, MANY // 2, 8).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    with torch.no_grad():
        before = model(x)
        assert taken == [name in OF_FACTORS] * 2
        torch.testing.assert_close(before, general(model, x), rtol=tolerance, atol=tolerance)
        if name in OF_FACTORS:
            for parameter in _factors(model).parameters():
                parameter.data.mul_(1.5)
            torch.testing.assert_close(model(x), general(model, x), rtol=tolerance, atol=tolerance)
            assert not torch.allclose(model(x), before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("refused", ["add_low_rank", "add_low_rank_to_prompts", "fits_work", "fits_prompts"])
def test_many_tokens_that_compiled_code_refuses(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if "prompts" in refused else torch.float32
    model, x = adapted(lora(), dtype=dtype), torch.randn(MANY, 8).to(dtype)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(decoding, refused, lambda *_: False)
        torch.testing.assert_close(model(x), expected, rtol=2**-6, atol=2**-6)


def test_float32_takes_the_general_path_beyond_its_limit(taken: list[bool]) -> None:
    model, most = adapted(lora(), dtype=torch.float32), MOST_TOKENS[torch.float32]
    with torch.no_grad():
        model(torch.randn(most + 1, 8))
    assert taken == [False, False]


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor_type", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_product_is_formed_in_the_wider_type(x_type: torch.dtype, factor_type: torch.dtype) -> None:
    model = adapted(lora(), bias=True, dtype=x_type)
    layer = model[0]
    layer.adapters.to(factor_type)
    x = torch.randn(2, 8).to(x_type)
    with torch.no_grad():
        y = layer(x)
        a, b, scaling, *_ = layer.adapters["default"].low_rank()
        exact = layer.base_layer(x).double() + scaling * x.double() @ a.double().T @ b.double().T
    assert y.dtype == x_type
    rounded = factor_type.itemsize <= x_type.itemsize == 2  # then A x is rounded to 16 bits on the way
    torch.testing.assert_close(y, exact.to(x_type), **({"rtol": 3e-2, "atol": 1e-2} if rounded else {}))


def _optimiser_step(model: Any, make: Callable[[Any], Any]) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    make(parameters).step()


def _elsewhere(change: Callable[[], Any]) -> None:
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()


def _swap(model: Any) -> None:
    present = _factors(model).lora_B_weight
    torch.utils.swap_tensors(present, nn.Parameter(torch.randn_like(present)))


def _load(model: Any) -> None:
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


def _new_base(model: Any) -> None:
    model[0].base_layer = nn.Linear(8, 8, dtype=model[0].weight.dtype)


def _add(model: Any) -> None:
    model.add_adapter("more", lora())
    model.set_adapter(["default", "more"])
    randomise(model, 0.2)


def _train_dropout_alone(model: Any) -> None:
    model[0].adapters["default"].dropout.train()


def _factors(model: Any) -> Any:
    return model[0].adapters["default"]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda m: _optimiser_step(m, lambda p: torch.optim.SGD(p, lr=0.5, foreach=False)),
    "SGD, foreach": lambda m: _optimiser_step(m, lambda p: torch.optim.SGD(p, lr=0.5, foreach=True)),
    "AdamW, fused": lambda m: _optimiser_step(m, lambda p: torch.optim.AdamW(p, lr=0.5, fused=True)),
    "an edit of .data": lambda m: _factors(m).lora_B_weight.data.add_(0.5),
    "new .data": lambda m: setattr(_factors(m).lora_B_weight, "data", torch.ones_like(_factors(m).lora_B_weight)),
    "a new parameter": lambda m: setattr(
        _factors(m), "lora_B_weight", nn.Parameter(torch.ones_like(_factors(m).lora_B_weight))
    ),
    "swap_tensors": _swap,
    "load_state_dict": _load,
    "the scaling": lambda m: setattr(_factors(m), "scaling", 9.0),
    "set_scale": lambda m: m[0].set_scale("default", 3.0),
    "the base's weight": lambda m: m[0].base_layer.weight.data.zero_(),
    "the base's weight, in place": lambda m: nn.init.zeros_(m[0].base_layer.weight),
    "the base layer": _new_base,
    "a merge": lambda m: m.merge_adapter(),
    "a second adapter": _add,
    "deletion": lambda m: m.delete_adapter("default"),
    "adapters disabled": lambda m: m.disable_adapter_layers(),
    "no adapter set": lambda m: m.set_adapter([]),
    "another thread": lambda m: _elsewhere(lambda: _factors(m).lora_B_weight.data.add_(0.5)),
    "a hook on the base": lambda m: m[0].base_layer.register_forward_hook(lambda module, x, y: y + 1),
    "a pre-hook on the base": lambda m: m[0].base_layer.register_forward_pre_hook(lambda module, x: (x[0] + 1,)),
    "the base's forward": lambda m: setattr(m[0].base_layer, "forward", lambda x: x * 2),
    "a bias that trains": lambda m: (
        m.add_adapter("biased", lora(bias="lora_only")) or m.set_adapter("biased") or randomise(m, 0.3)
    ),
}


CASES = [
    (method, name)
    for method in ("lora", "dora", "adalora")
    for name in CHANGES
    if (method, name) != ("dora", "the base's weight")  # edits of it through .data are the ones that DoRA cannot see
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("method, name", CASES)
def test_a_change_is_seen_at_once(method: str, name: str, mode: Any, dtype: torch.dtype) -> None:
    """In float32, compiled code reads the factors at addresses from an earlier call."""
    config = METHODS["adalora"] if method == "adalora" else lora(lora_dropout=0.5, use_dora=method == "dora")
    model, x = adapted(config, bias=method == "lora", dtype=dtype), X.to(dtype)
    with mode():
        before = model(x)
        model(x)
    CHANGES[name](model)
    if any(module.training for module in model.modules()):
        model.eval()  # not otherwise: it counts as a change of every adapter
    with mode():
        after = model(x)
        torch.testing.assert_close(after, general(model, x), **TOLERANCES[dtype])
    assert torch.allclose(before, after) == (name == "a merge")


MAGNITUDE = "lora_magnitude_vector_weight"
CHANGES_OF_MAGNITUDE: dict[str, Callable[[Any, Any], Any]] = {
    "an edit of .data": lambda lora, m: m.data.add_(0.5),
    "new .data": lambda lora, m: setattr(m, "data", torch.ones_like(m)),
    "a new parameter": lambda lora, m: setattr(lora, MAGNITUDE, nn.Parameter(torch.ones_like(m))),
    "swap_tensors": lambda lora, m: torch.utils.swap_tensors(m, nn.Parameter(torch.ones_like(m))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", CHANGES_OF_MAGNITUDE)
def test_a_change_of_doras_magnitude_is_seen_at_once(change: str, dtype: torch.dtype) -> None:
    model, x = adapted(lora(use_dora=True), dtype=dtype), X.to(dtype)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        CHANGES_OF_MAGNITUDE[change](_factors(model), getattr(_factors(model), MAGNITUDE))
        after = model(x)
        torch.testing.assert_close(after, general(model, x), **TOLERANCES[dtype])
    assert not torch.allclose(before, after)


def _with_forward_hook(layer: Any, seen: list[str]) -> Any:
    return layer.register_forward_hook(lambda *_: seen.append("called"))


def _with_forward_pre_hook(layer: Any, seen: list[str]) -> Any:
    return layer.register_forward_pre_hook(lambda *_: seen.append("called"))


def _with_hook_of_all_modules(layer: Any, seen: list[str]) -> Any:
    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if module is layer:
            seen.append("called")

    return torch_module.register_module_forward_hook(note)


def _with_hook_of_all_modules_before(layer: Any, seen: list[str]) -> Any:
    def note(module: nn.Module, _inputs: Any) -> None:
        if module is layer:
            seen.append("called")

    return torch_module.register_module_forward_pre_hook(note)


@pytest.mark.parametrize("part", ["layer", "base layer"])
@pytest.mark.parametrize(
    "register",
    [_with_forward_hook, _with_forward_pre_hook, _with_hook_of_all_modules, _with_hook_of_all_modules_before],
)
def test_hooks_are_called_from_when_they_are_added_until_they_are_removed(register: Any, part: str) -> None:
    model, seen = adapted(lora()), []
    layer = model[1] if part == "layer" else model[1].base_layer
    with torch.no_grad():
        expected = model(X)
        handle = register(layer, seen)
        found = model(X)
        handle.remove()
        assert seen == ["called"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        model(X)
    assert seen == ["called"]


def test_a_forward_that_is_replaced_is_called() -> None:
    model, layer = adapted(lora()), adapted(lora())[1]
    with torch.no_grad():
        expected = model(X)
        model[1].forward = lambda x: layer.forward(x) + 1
        torch.testing.assert_close(model(X), expected + 1, rtol=0, atol=1e-14)
        del model[1].forward
        assert torch.equal(model(X), expected)


def test_a_layer_that_was_compiled_alone_runs_as_compiled() -> None:
    model, seen = adapted(lora()), []

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append("compiled")
        return graph.forward

    with torch.no_grad():
        expected = model(X)
        model[1].compile(backend=backend)
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-14)
    assert seen == ["compiled"]


def test_an_edit_inside_of_inference_mode_is_seen() -> None:
    model = adapted(lora())
    with torch.inference_mode():
        base = model[0].base_layer(X)
        change = model[0](X) - base
        _factors(model).lora_B_weight.mul_(2.0)
        torch.testing.assert_close(model[0](X) - base, 2 * change)


def test_dropout_that_trains_alone_drops() -> None:
    model = adapted(lora(lora_dropout=0.5))
    with torch.no_grad():
        before = model(X)
        _train_dropout_alone(model)
        assert not torch.allclose(model(X), before)
        model.eval()
        assert torch.equal(model(X), before)


def test_a_model_that_was_moved_to_another_type() -> None:
    model = adapted(lora())
    with torch.no_grad():
        before = model(X)
        after = model.bfloat16()(X.bfloat16())
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.double(), before, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_copies_are_independent(dtype: torch.dtype) -> None:
    """In float32, the model has addresses of its factors when it is copied."""
    model, x, file = adapted(lora(), dtype=dtype), X.to(dtype), io.BytesIO()
    before = model(x)
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    _factors(model).lora_B_weight.add_(1.0)
    assert not torch.allclose(model(x), before)
    assert all(torch.equal(each(x), before) for each in copies)
    _factors(copies[0]).lora_B_weight.add_(1.0)
    torch.testing.assert_close(copies[0](x), model(x))


class Siblings(nn.Module):
    """Two layers with one input, which is changed between them if `changes`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.changes = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.first(x)
        if self.changes:
            x.add_(1)
        return y + 2 * self.second(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("changes", [False, True])
def test_siblings_share_the_wide_input_only_while_it_is_unchanged(changes: bool, mode: Any) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Siblings().bfloat16(), lora(target_modules=["first", "second"])).eval()
    randomise(model, 0.3)
    model.changes = changes
    x = torch.randn(2, 8).bfloat16()
    with mode():
        quick = model(x)
        layers = [model.first.base_layer, model.second.base_layer]
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in layers]
        torch.testing.assert_close(quick, model(x), atol=0.1, rtol=0.02)
    assert len(hooks) == 2 and model.first.selection.cache.widened is None


def test_an_input_is_never_changed_in_place() -> None:
    model = adapted(lora())
    kept = torch.ones(2, 8, dtype=torch.float64)
    model[0].base_layer.register_forward_hook(lambda *_: kept)  # a base whose output is somebody else's tensor
    with torch.no_grad():
        assert not torch.equal(model[0](torch.ones(2, 8, dtype=torch.float64)), kept)
    assert torch.equal(kept, torch.ones(2, 8, dtype=torch.float64))


def test_edits_of_a_scale_are_seen(taken: list[bool]) -> None:
    model = adapted(METHODS["ia3"], bias=True)
    first, second = (layer.adapters["default"] for layer in model)
    assert [one.scale_name().of_input for one in (first, second)] == [False, True]
    edits: list[Callable[[], Any]] = [
        lambda: first.ia3_l.data.mul_(2),
        lambda: setattr(first, "ia3_l", nn.Parameter(torch.full_like(first.ia3_l, 3.0))),
        lambda: second.ia3_l.data.add_(1),
        lambda: setattr(second, "scales_input", True),
        lambda: model.disable_adapters(),
    ]
    with torch.no_grad():
        model(X)
        for edit in edits:
            edit()
            taken.clear()
            torch.testing.assert_close(model(X), general(model, X), atol=1e-12, rtol=0)
            assert taken[0]


ROWS = ["b", "default", "default", None, "c", "default"]
"""The adapters of the rows of a mixed batch."""


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(a model with three adapters in float32, a function that returns its outputs by compiled code and by stacks)"""
    if not compiled_low_rank.compiled():
        pytest.skip("nothing is compiled here; the log says why")
    model = adapted(lora(), dtype=torch.float32)
    for name, rank in (("b", 4), ("c", 3)):
        model.add_adapter(name, lora(r=rank, init_lora_weights=False))

    def outputs(x: Tensor, rows: Any = ROWS) -> tuple[Tensor, Tensor]:
        calls: list[int] = []
        original = decoding_by_row.add_low_rank_by_row
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(decoding_by_row, "add_low_rank_by_row", lambda *given: calls.append(1) or original(*given))
            fast = model(x, adapter_names=rows)
            assert len(calls) == 2
            patch.setattr(decoding_by_row, "computes", lambda dtype: False)
            return fast, model(x, adapter_names=rows)

    return model, outputs


@pytest.mark.parametrize("shape", [(6, 8), (6, 1, 8), (6, 5, 8)])
def test_mixed_batch_by_row(mixed: Any, shape: tuple[int, ...]) -> None:
    _, outputs = mixed
    torch.testing.assert_close(*outputs(torch.randn(shape)))


CHANGES_OF_ROWS: dict[str, Callable[[Any], Any]] = {
    "values in place": lambda a: a.lora_A_weight.data.mul_(2),
    "other memory": lambda a: setattr(a.lora_B_weight, "data", a.lora_B_weight.data * 3),
    "another parameter": lambda a: setattr(a, "lora_A_weight", nn.Parameter(a.lora_A_weight.detach() * 2)),
    "a smaller rank in the same memory": lambda a: (
        setattr(a.lora_A_weight, "data", a.lora_A_weight.data[:2]),
        setattr(a.lora_B_weight, "data", a.lora_B_weight.data[:, :2]),
    ),
    "scaling": lambda a: setattr(a, "scaling", a.scaling * 2),
    "another type": lambda a: a.double(),
}


@pytest.mark.parametrize("change", CHANGES_OF_ROWS)
def test_mixed_batch_follows_a_change(mixed: Any, change: str) -> None:
    model, outputs = mixed
    x = torch.randn(6, 8)
    before, _ = outputs(x)
    CHANGES_OF_ROWS[change](model[0].adapters["default"])
    with torch.no_grad():
        after = model(x, adapter_names=ROWS)
        alone = [model(one, adapter_names=[name]) for one, name in zip(x.split(1), ROWS, strict=True)]
    torch.testing.assert_close(after, torch.cat(alone))
    assert not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("of_all_modules", [False, True])
def test_mixed_batch_with_a_hook_and_after_it(mixed: Any, of_all_modules: bool) -> None:
    model, outputs = mixed
    x, base = torch.randn(6, 8), model[1].base_layer
    before, _ = outputs(x)

    def add_one(module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
        return y + 1 if module is base else y

    hook = torch_module.register_module_forward_hook(add_one) if of_all_modules else base.register_forward_hook(add_one)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=ROWS), before + 1)
    hook.remove()
    torch.testing.assert_close(outputs(x)[0], before)


def test_mixed_batch_after_adding_and_deleting_an_adapter(mixed: Any) -> None:
    model, outputs = mixed
    x = torch.randn(6, 8)
    before, _ = outputs(x)
    model.add_adapter("later", lora(init_lora_weights=False))
    with_later, by_stacks = outputs(x, ["later", *ROWS[1:]])
    torch.testing.assert_close(with_later, by_stacks)
    assert not torch.equal(with_later[0], before[0]) and torch.equal(with_later[1:], before[1:])
    model.delete_adapter("later")
    torch.testing.assert_close(outputs(x)[0], before)


def test_mixed_batch_compares_the_adapters_of_all_layers_once_in_a_call(
    mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, outputs = mixed
    x = torch.randn(6, 8)
    before, _ = outputs(x)
    compared: list[tuple[int, bool]] = []
    original = decoding_by_row.AdapterStates.hold

    def hold(states: Any, compare_memory: bool) -> bool:
        compared.append((len(states._attributes), compare_memory))
        return original(states, compare_memory)

    monkeypatch.setattr(decoding_by_row.AdapterStates, "hold", hold)
    with torch.no_grad(), model.route(ROWS):
        assert torch.equal(model(x), before)
        assert compared == [(6, True)]  # three adapters in each of two layers
        compared.clear()
        with unchanging_weights():
            assert torch.equal(model(x), before) and torch.equal(model(x), before)
            assert compared == [(6, True), (6, False)]
        compared.clear()
        one_by_one: list[Any] = []
        holds = decoding_by_row.AdapterState.holds
        monkeypatch.setattr(
            decoding_by_row.AdapterState, "holds", lambda state, scope: one_by_one.append(scope) or holds(state, scope)
        )
        model[1](model[0](x))  # outside of a call of the model: each layer compares its three adapters
        assert not compared and one_by_one == [None] * 6


def test_mixed_batch_of_much_work_computes_the_base_once(mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, outputs = mixed
    x = torch.randn(6, 8)
    expected, _ = outputs(x)
    monkeypatch.setattr(compiled_low_rank, "MOST_WORK_BY_ROW", 0)
    monkeypatch.setattr(compiled_low_rank, "MOST_WORK", 0)
    monkeypatch.setattr(decoding_by_row, "base_output", lambda *_: pytest.fail("the stacks compute it again"))
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=ROWS), expected)


@pytest.mark.parametrize("change", ["other memory", "scaling"])
def test_layer_called_alone_after_a_call_of_the_model(mixed: Any, change: str) -> None:
    model, _ = mixed
    x = torch.randn(6, 8)
    with torch.no_grad(), model.route(ROWS):
        model(x)
        before = model[0](x)
        CHANGES_OF_ROWS[change](model[0].adapters["default"])
        after = model[0](x)
    with torch.no_grad(), model.route("default"):
        alone = model[0](x)
    rows = [number for number, name in enumerate(ROWS) if name == "default"]
    torch.testing.assert_close(after[rows], alone[rows])
    assert not torch.equal(before, after)


def test_scaling_is_seen_while_weights_are_promised_not_to_change(mixed: Any) -> None:
    model, outputs = mixed
    x = torch.randn(6, 8)
    with unchanging_weights():
        before, _ = outputs(x)
        model[0].adapters["default"].scaling *= 2
        after, by_stacks = outputs(x)
    torch.testing.assert_close(after, by_stacks)
    assert not torch.equal(before, after)


def test_threads_share_the_plans_of_mixed_batches(mixed: Any) -> None:
    model, outputs = mixed
    x = torch.randn(6, 8)
    expected, _ = outputs(x)
    wrong: list[Any] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(x, adapter_names=ROWS), expected):
                    wrong.append(1)
                model[0].adapters["b"].mark_changed()  # the plans are made again

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
