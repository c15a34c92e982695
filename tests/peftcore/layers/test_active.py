"""Which adapters are in effect: the active ones, or those of the route of this thread."""

import copy
import threading

import torch

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
    assert active.share("a", 3) == 1.0 and not any(active.in_use.values())


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
