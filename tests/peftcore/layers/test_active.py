"""Which adapters are in effect: the active ones, or those of the route of this thread."""

import copy
import threading
from typing import Any

import pytest
import torch
from routed_models import TOKENS, llama, lora, mixture
from torch import Tensor

from peftcore import PolyConfig
from peftcore.composition.route import Route
from peftcore.layers.active import REMEMBERED_SETS, Selection


def selection(*active: str) -> Selection:
    made = Selection()
    made.active = active
    return made


def test_a_route_has_precedence_over_the_active_adapters_and_over_switching_off() -> None:
    active = selection("a", "b")
    assert active.in_effect == ("a", "b") and active.route is None
    active.switched_off = True
    assert active.in_effect == () and active.active == ("a", "b")
    with active.routed(Route("c")) as route:
        assert active.in_effect == ("c",) and active.route is route
        with active.routed(Route(None)):
            assert active.in_effect == ()
        assert active.in_effect == ("c",)
    assert active.in_effect == ()


def test_a_mixed_route_has_every_adapter_in_effect() -> None:
    active = selection("a")
    with active.routed(Route(["c", None, "b"])):
        assert active.in_effect == ("b", "c")
        assert active.share("a", 3) == 0.0
        assert torch.equal(torch.as_tensor(active.share("c", 3)), torch.tensor([1.0, 0, 0]))
        assert active.in_use == {"b": 1, "c": 1}
    assert active.share("a", 3) == 1.0 and active.in_use == {} and not list(active.in_use)


def test_a_route_is_in_effect_in_its_own_thread_only() -> None:
    active = selection("a")
    seen = []
    with active.routed(Route("b")):
        thread = threading.Thread(target=lambda: seen.append(active.in_effect))
        thread.start()
        thread.join()
    assert seen == [("a",)]


def test_a_copy_has_the_active_adapters_and_no_route() -> None:
    active = selection("a")
    with active.routed(Route("b")):
        other = copy.deepcopy(active)
        assert other.in_effect == ("a",) and active.in_effect == ("b",)


def test_plans_of_the_latest_sets_are_remembered() -> None:
    active = selection("a")
    plans = [active.plans_of((name,)) for name in "abcdef"[:REMEMBERED_SETS]]
    assert all(active.plans_of((name,)) is plan for name, plan in zip("abcdef", plans, strict=False))
    active.plans_of(("another",))
    assert active.plans_of(("b",)) is plans[1] and active.plans_of(("a",)) is not plans[0]
    active.forget()
    assert active.plans_of(("b",)) is not plans[1]


def test_an_error_inside_leaves_no_route() -> None:
    model = mixture(llama())
    model.set_adapter("a")
    expected = model(TOKENS).logits
    with pytest.raises(IndexError):
        model(torch.full((2, 3), 999), adapter_names=["b", None])
    with pytest.raises(ZeroDivisionError), model.route(["b", None]):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS).logits, expected)
    assert not any(model._adapter_set.selection.in_use.values())


def test_routes_nest_and_disabling_stands_over_them() -> None:
    model = mixture(llama())
    alone = {name: model(TOKENS, adapter_names=name).logits for name in ("__base__", "a", "b")}
    with model.route("a"):
        with model.route("b"):
            assert torch.equal(model(TOKENS).logits, alone["b"])
        assert torch.equal(model(TOKENS).logits, alone["a"])
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, alone["__base__"])
        assert torch.equal(model(TOKENS).logits, alone["a"])


def test_threads_do_not_see_each_others_routes() -> None:
    """The arguments of a call are thread-local, too: invocation positions of aLoRA, tasks of Poly."""
    model = mixture(llama())
    model.add_adapter("invoked", lora(alora_invocation_tokens=[20]))
    model.add_adapter("poly", PolyConfig(n_tasks=2, n_skills=2, r=2, target_modules=["q_proj"], init_weights=False))
    model.double().eval()
    names = ["a", "b", "c", "__base__", "invoked", "poly"]
    tokens = {name: TOKENS if name == "invoked" else TOKENS.flip(0) for name in names}
    given = {name: {"task_ids": torch.tensor([0, 1] * 3)} if name == "poly" else {} for name in names}

    def forward(name: str) -> Tensor:
        return model(tokens[name], adapter_names=name, **given[name]).logits

    with torch.no_grad():
        alone = {name: forward(name) for name in names}
    failures: list[str] = []
    start = threading.Barrier(len(names))

    def work(name: Any) -> None:
        start.wait()
        for turn in range(15):
            with torch.no_grad():
                if turn % 2:
                    found = forward(name)
                else:
                    found = model(tokens[name], adapter_names=[name] * len(TOKENS), **given[name]).logits
            if not torch.allclose(found, alone[name], atol=1e-10, rtol=0):
                failures.append(f"{name} in turn {turn}")

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_model_copied_inside_a_route_has_no_route() -> None:
    model = mixture(llama())
    model.set_adapter("a")
    with torch.no_grad(), model.route("b"):
        model(TOKENS)
        copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS).logits, model(TOKENS).logits)
