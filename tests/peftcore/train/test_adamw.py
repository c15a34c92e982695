"""FusedAdamW is torch.optim.AdamW(fused=True), bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.train import FusedAdamW

SHAPES = [(4, 6), (6, 4), (3,), (5, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DECAYS = [0.1, 0.0]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """Of three dtypes, in the order of the groups: two of DECAYS' groups share them by turns."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(d)) for d in DTYPES for shape in SHAPES]


def groups(trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": trained[i::2], "weight_decay": decay} for i, decay in enumerate(DECAYS)]


def both() -> tuple[Any, Any, list[nn.Parameter], list[nn.Parameter]]:
    mine, theirs = parameters(), parameters()
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    return FusedAdamW(groups(mine), **options), torch.optim.AdamW(groups(theirs), fused=True, **options), mine, theirs


def give_gradients(step: int, *copies: list[nn.Parameter], without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, shared in enumerate(zip(*copies, strict=True)):
        gradient = torch.randn(shared[0].shape, generator=generator)
        for parameter in shared:
            parameter.grad = None if i in without else gradient.to(parameter.dtype)


def assert_equal(mine: list[nn.Parameter], theirs: list[nn.Parameter], one: Any, other: Any) -> None:
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)
        assert (p in one.state) == (q in other.state)
        for name, value in other.state.get(q, {}).items():
            assert torch.equal(one.state[p][name], value), name


def test_steps_are_pytorchs_bit_for_bit_with_groups_and_a_schedule() -> None:
    one, other, mine, theirs = both()
    schedules = [torch.optim.lr_scheduler.ExponentialLR(made, 0.7) for made in (one, other)]
    for step in range(6):
        give_gradients(step, mine, theirs)
        one.step()
        other.step()
        for schedule in schedules:
            schedule.step()
    assert_equal(mine, theirs, one, other)
    assert not torch.equal(mine[0], parameters()[0])


def test_parameters_without_gradient_are_left_alone_and_count_their_own_steps() -> None:
    one, other, mine, theirs = both()
    for step, without in enumerate([(), (0, 5), (0, 1, 2), tuple(range(12)), (7,), ()]):
        give_gradients(step, mine, theirs, without=without)
        one.step()
        other.step()
        assert_equal(mine, theirs, one, other)
    assert {int(one.state[p]["step"]) for p in mine} == {3, 4, 5}


def test_a_parameter_that_never_had_a_gradient_has_no_state() -> None:
    one, _, mine, theirs = both()
    give_gradients(0, mine, theirs, without=(3,))
    one.step()
    one.step()
    assert mine[3] not in one.state and torch.equal(mine[3], parameters()[3])


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_a_state_of_pytorchs_goes_on_here_and_back(kind: str) -> None:
    one, _, mine, theirs = both()
    other = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, fused=kind == "fused")
    for step in range(3):
        give_gradients(step, theirs, without=(2,) if step else ())
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q)
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    last = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, fused=True)
    last.load_state_dict(copy.deepcopy(other.state_dict()) | {"param_groups": last.state_dict()["param_groups"]})
    for step in (3, 4):
        give_gradients(step, mine, theirs)
        one.step()
        last.step()
    assert_equal(mine, theirs, one, last)
    back = torch.optim.AdamW(groups(theirs), fused=True)
    back.load_state_dict(copy.deepcopy(one.state_dict()))
    give_gradients(5, mine, theirs)
    one.step()
    back.step()
    assert_equal(mine, theirs, one, back)


def test_loading_does_not_tie_the_counts_of_two_optimisers() -> None:
    one, _, mine, theirs = both()
    give_gradients(0, mine, theirs)
    one.step()
    copied = FusedAdamW(groups(theirs))
    copied.load_state_dict(one.state_dict())
    one.step()
    assert {int(copied.state[p]["step"]) for p in theirs} == {1} and {int(one.state[p]["step"]) for p in mine} == {2}


def test_a_parameter_that_takes_anothers_place_keeps_its_moments() -> None:
    # as a method that shrinks its tensors does
    one, other, mine, theirs = both()
    for step in range(3):
        give_gradients(step, mine, theirs)
        one.step()
        other.step()
    for made, trained in ((one, mine), (other, theirs)):
        old, new = trained[0], nn.Parameter(trained[0].detach()[:2].clone())
        made.param_groups[0]["params"] = [new if p is old else p for p in made.param_groups[0]["params"]]
        made.state[new] = {name: v[:2].clone() if v.dim() else v for name, v in made.state.pop(old).items()}
        trained[0] = new
    give_gradients(3, mine, theirs)
    one.step()
    other.step()
    assert_equal(mine, theirs, one, other)


def test_a_closure_gives_the_loss() -> None:
    parameter = nn.Parameter(torch.ones(3))
    made = FusedAdamW([parameter], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert made.step(closure).item() == 3
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))


def test_a_gradient_scaler_unscales_and_skips_what_overflows() -> None:
    parameter, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    made, other = FusedAdamW([parameter], lr=0.1), torch.optim.AdamW([plain], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    taken = []
    made.register_step_post_hook(lambda *_: taken.append(True))
    scaler.scale(parameter.square().sum()).backward()
    scaler.step(made)
    scaler.update()
    plain.square().sum().backward()
    other.step()
    assert torch.equal(parameter, plain) and len(taken) == 1
    assert parameter.grad is not None
    parameter.grad.fill_(float("inf"))
    scaler.step(made)
    assert torch.equal(parameter, plain) and len(taken) == 1
