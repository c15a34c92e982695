"""The stacked path equals the general path, and cached stacks follow every change of weights, layers and adapters."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from routed_models import GREEDY, TOKENS, adapted, assert_rows_as_alone, llama, lora, mixture
from torch import Tensor, nn

from peftcore.composition import Split, Stack, stacked
from peftcore.layers import decoding_by_row, forward_paths


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Number of layers that each stacked product has computed."""
    seen: list[int] = []
    original = forward_paths.stacked_outputs

    def counted(x: Tensor, bases: Any, *others: Any) -> Any:
        seen.append(len(bases))
        return original(x, bases, *others)

    monkeypatch.setattr(forward_paths, "stacked_outputs", counted)
    return seen  # type: ignore[return-value]


def test_layers_of_one_input_share_one_stacked_product(stacks: list[int]) -> None:
    model = mixture(llama())
    with torch.no_grad():
        for given in (["a", "b", None, "a", "b", "a"], {"a": 0.5, "b": 0.5}, Split(a=3, b=2)):
            stacks.clear()
            model(TOKENS, adapter_names=given)
            assert stacks == [3, 1, 2, 1] * 2, given  # query, key, value; output; gate, up; down
            model.zero_grad()
        stacks.clear()
        model(TOKENS, adapter_names=["a", "c", None, "a", "b", "a"])
        assert stacks == [2, 1, 1, 1] * 2 and not model._adapter_set.selection.cache.outputs
    stacks.clear()
    model(TOKENS, adapter_names=["a", "b", None, "a", "b", "a"])  # with gradients
    assert not stacks


def test_long_runs_are_computed_without_a_stack(stacks: list[int]) -> None:
    model = mixture(llama())
    tokens = torch.arange(3, 59).repeat(6, 2)[:, :100]
    names = ["a", "a", "b", None, {"a": 0.5, "b": -2.0}, "a"]
    expected = model(tokens, adapter_names=names).logits
    with torch.no_grad():
        stacks.clear()
        torch.testing.assert_close(model(tokens, adapter_names=names).logits, expected, atol=1e-10, rtol=0)
        assert not stacks and not model._adapter_set.selection.stacks
        model(tokens[:, :9], adapter_names=names)
        assert stacks


def test_stacks_follow_the_weights(stacks: list[int]) -> None:
    model = mixture(llama())
    names = ["a", "b", "a", None, "a", "b"]

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            fast = model(TOKENS, adapter_names=names).logits
        return fast, model(TOKENS, adapter_names=names).logits

    before = both()[0]
    for parameter in model.parameters():
        if parameter.shape[:1] == (4,):
            with torch.no_grad():
                parameter.mul_(1.5)
    fast, general = both()
    assert not torch.allclose(fast, before)
    torch.testing.assert_close(fast, general, atol=1e-10, rtol=0)
    model.delete_adapter("b")
    model.add_adapter("b", lora(r=3))
    torch.testing.assert_close(*both(), atol=1e-10, rtol=0)
    model.set_requires_grad("a", True)
    with torch.no_grad():
        fast = model(TOKENS, adapter_names=names).logits
        for name, parameter in model.named_parameters():
            if ".a." in name:
                parameter.data.mul_(2.0)  # as an optimiser of another library does: no version is counted
    torch.testing.assert_close(*both(), atol=1e-10, rtol=0)
    assert not torch.allclose(both()[0], fast)


@pytest.mark.parametrize("ranks", [[3] * 9, [3] * 8 + [2]], ids=["batched by adapter", "other ranks"])
def test_rows_with_one_adapter_or_none_are_batched_by_adapter(
    ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=r, lora_alpha=5) for n, r in enumerate(ranks)})
    names: list[Any] = [f"a{n}" for n in (4, 0, 8, 1, 7, 2, 6, 3, 5)]
    tokens = torch.arange(3, 39).view(18, 2)
    batched: list[int] = []
    original = forward_paths.batched_outputs
    monkeypatch.setattr(forward_paths, "batched_outputs", lambda *given: batched.append(1) or original(*given))
    twice = [name for name in names for _ in range(2)]
    unequal = [*names[:8], None], [*names, "a0"], [None, *names, "a3", "a3"]
    for given in (names, sorted(names), names * 2, twice, *unequal):
        batched.clear()
        assert_rows_as_alone(model, given, tokens)
        assert bool(batched) == (set(ranks) == {3})
    for given in ([*names[:8], {"a5": 0.5}], [*names[:8], Stack("a5", "a0")], ["a0"] * 9 + names[:8]):
        batched.clear()
        assert_rows_as_alone(model, given, tokens)
        assert not batched
    with torch.no_grad(), model.route(names):  # beams, which lie together
        beams = model.generate(tokens[:9], num_beams=2, **GREEDY)
    for row, name in enumerate(names):
        with torch.no_grad(), model.route(name):
            alone = model.generate(tokens[row : row + 1], num_beams=2, **GREEDY)
        assert torch.equal(beams[row, : alone.shape[1]], alone[0])  # alone it may end earlier


def test_rows_that_come_and_go_use_the_stacks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=3, lora_alpha=5) for n in range(20)})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    made: list[int] = []
    original = stacked.stack
    monkeypatch.setattr(stacked, "stack", lambda layers, dtype: made.append(len(layers[0])) or original(layers, dtype))

    def made_for(*numbers: int) -> set[int]:
        """Adapters in each stack that a batch with these adapters makes (counts)."""
        made.clear()
        names = [f"a{n}" for n in numbers]
        assert_rows_as_alone(model, names, torch.arange(2 * len(names)).view(-1, 2))
        return set(made)

    assert made_for(*range(9)) == {9}
    assert made_for(*range(8)) == made_for(8, 0, 3) == set(), "less than four times as many as are used"
    assert made_for(5, 7) == {8}, "nine are too many for two, so six of them are kept"
    assert made_for(5, 7, 1) == set()
    assert made_for(8, 9, 0) == {10}
    assert made_for(*range(10, 15)) == {15}
    assert made_for(*range(10)) == made_for(14, 9, 0, 3) == set()
    assert made_for(*range(15, 20)) == {16}, "no more are kept"
    model.delete_adapter("a16")
    assert made_for(15, 17, 18) == {3}, "a deleted adapter is in no stack"
    model.add_adapter("a16", lora(r=3, lora_alpha=7))
    assert made_for(15, 16) == {4}, "the new adapter of that name"


def test_a_kept_adapter_that_is_broken_disturbs_no_row() -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=3) for n in range(4)})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokens = torch.arange(3, 15).view(6, 2)
    assert_rows_as_alone(model, ["a0", "a1", "a2", "a3", "a0", None], tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".a3." in name:
                parameter.fill_(torch.nan)
    assert_rows_as_alone(model, ["a0", "a1", "a2", "a2", "a0", None], tokens)


def test_in_16_bits_many_adapters_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=3, lora_alpha=5) for n in range(9)}).bfloat16()
    names: list[Any] = [f"a{n}" for n in (4, 0, 8, 1, 7, 2, 6, 3, 5)]
    tokens, used = torch.arange(3, 12).view(9, 1), []
    original = forward_paths.batched_outputs
    monkeypatch.setattr(decoding_by_row, "computes", lambda dtype: False)  # compiled code stacks nothing
    monkeypatch.setattr(
        forward_paths, "batched_outputs", lambda *given: used.append(given[2].a.dtype) or original(*given)
    )
    with torch.no_grad():
        together = model(tokens, adapter_names=names).logits
        alone = [model(tokens[row : row + 1], adapter_names=[name]).logits for row, name in enumerate(names)]
    assert together.dtype == torch.bfloat16 and set(used) == {torch.float32}
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-2, rtol=2e-2)


def _hooked(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.base_layer.register_forward_hook(lambda layer, args, y: y * 2)


def _listened_to_before(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.base_layer.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))


def _forward_replaced(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj.base_layer
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2


def _base_replaced(model: Any) -> None:
    layer = model.model.layers[1].mlp.gate_proj.base_layer
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


def _base_trained(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.base_layer.weight.requires_grad_(True)


def _rounded(model: Any) -> None:
    model.float().double()


def _assigned(model: Any) -> None:
    state = {key: value * 2 if ".a." in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _edited(model: Any) -> None:
    with torch.no_grad():
        model._adapter_set.layers["model.layers.0.self_attn.k_proj"].adapters["a"].lora_B_weight.mul_(2)


def _added(model: Any) -> None:
    model.delete_adapter("b")
    model.add_adapter("b", lora(r=2, target_modules=["q_proj", "down_proj"]))


def _input_of_one_layer_changed(model: Any) -> None:
    """A layer whose output a sibling computed is called with another input."""
    first = model.model.layers[0].self_attn
    inside = first.k_proj.forward
    first.k_proj.forward = lambda x: inside(x * 2)


@pytest.mark.parametrize(
    "change",
    [
        _hooked,
        _listened_to_before,
        _forward_replaced,
        _base_replaced,
        _base_trained,
        _rounded,
        _assigned,
        _edited,
        _added,
        _input_of_one_layer_changed,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("names", [["a", "b", None, "a", {"b": 0.5}, "b"], "a"], ids=["rows", "one"])
def test_cached_plans_and_stacks_follow_every_change(change: Any, names: Any) -> None:
    model = mixture(llama())
    with model.route(names):  # the same one before and after
        with torch.no_grad():
            before = model(TOKENS).logits
        if change is not _added:
            change(model)
        for _ in range(2):
            with torch.no_grad():
                fast = model(TOKENS).logits
            general = model(TOKENS).logits
            torch.testing.assert_close(fast, general, atol=1e-10, rtol=0)
            assert change in (_added, _base_trained, _rounded) or not torch.allclose(fast, before, atol=1e-6)
            model.zero_grad()
    if change is _added:
        change(model)
    with torch.no_grad():  # the same names again, by a route of their own
        fast = model(TOKENS, adapter_names=names).logits
    torch.testing.assert_close(fast, model(TOKENS, adapter_names=names).logits, atol=1e-10, rtol=0)


def test_stacks_follow_the_active_adapters() -> None:
    model = mixture(llama())
    for change in (
        lambda: model.set_adapter(["a", "b"]),
        lambda: model.merge_adapter(["a"]),
        lambda: model.unmerge_adapter(),
        lambda: model.set_adapter("b"),
    ):
        change()
        for _ in range(2):
            with torch.no_grad():
                fast = model(TOKENS).logits
            torch.testing.assert_close(fast, model(TOKENS).logits, atol=1e-10, rtol=0)


def test_stacks_follow_ranks_that_change_in_training() -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=3) for n in range(9)})
    model.set_requires_grad("a4", True)
    for names in ([f"a{n % 9}" for n in range(6)], [f"a{n}" for n in range(9)], "a4"):
        tokens = TOKENS if len(names) == 6 else torch.arange(3, 39).view(9, 4)
        for rank in (3, 2, 4):
            for site in model._adapter_set.layers.values():
                adapter = site.adapters["a4"]
                o, i = adapter.lora_B_weight.shape[0], adapter.lora_A_weight.shape[1]
                adapter.lora_A_weight = nn.Parameter(torch.randn(rank, i, dtype=torch.float64))
                adapter.lora_B_weight = nn.Parameter(torch.randn(o, rank, dtype=torch.float64))
            with torch.no_grad():
                fast = model(tokens, adapter_names=names).logits
            general = model(tokens, adapter_names=names).logits
            torch.testing.assert_close(fast, general.detach(), atol=1e-9, rtol=0)


def test_cached_stacks_do_not_disable_dropout() -> None:
    model = adapted(llama(), a=lora(lora_dropout=0.5), b=lora())
    with torch.no_grad():
        for names in ("a", ["a", "b", None, "a", "b", "a"]):
            for trains in (False, True, False):
                model.train(trains)
                once, again = (model(TOKENS, adapter_names=names).logits for _ in range(2))
                assert torch.equal(once, again) != trains


@pytest.mark.parametrize("broken", ["weights", "activations"])
def test_an_adapter_that_is_not_finite_spoils_only_its_own_rows(broken: str) -> None:
    model = mixture(llama(torch.float32)).float()
    names = ["a", "b", None, "a", {"b": 0.5}, "c"]
    with torch.no_grad():
        expected = model(TOKENS, adapter_names=names).logits
        for name, parameter in model.named_parameters():
            if "lora_A.a.weight" in name:
                parameter.fill_(torch.nan if broken == "weights" else 3e38)
        for given in (names, ["a", "b", None, "a", {"b": 0.5}, "b"]):
            found = model(TOKENS, adapter_names=given).logits
            torch.testing.assert_close(found[[1, 2, 4]], expected[[1, 2, 4]], atol=1e-4, rtol=0)
            assert not found[0].isfinite().any()


def test_a_deleted_adapter_is_freed() -> None:
    model = mixture(llama())
    with torch.no_grad():
        model(TOKENS, adapter_names=["a", "b", None, "a", "b", "a"])
    gone = weakref.ref(model._adapter_set.layers["model.layers.0.mlp.up_proj"].adapters["b"].lora_A_weight)
    model.delete_adapter("b")
    gc.collect()
    assert gone() is None


def test_half_precision_at_a_layer_is_close_to_double() -> None:
    """Per layer, because a model's own rounding would hide an error."""
    torch.manual_seed(0)
    exact = adapted(
        nn.Sequential(nn.Linear(64, 48)).double(), a=lora(target_modules=["0"]), b=lora(target_modules=["0"])
    )
    half = copy.deepcopy(exact).to(torch.bfloat16)
    x, names = torch.randn(6, 64).bfloat16(), ["a", "b", None, {"a": 0.5, "b": 0.5}, "b", "a"]
    with torch.no_grad():
        found, expected = half(x, adapter_names=names), exact(x.double(), adapter_names=names)
    assert (found.double() - expected).norm() / expected.norm() < 0.01
