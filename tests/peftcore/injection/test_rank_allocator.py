"""HF PEFT's allocator of AdaLoRA's ranks, and the methods that shrink an adapter to its triplets."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator as TheirAllocator
from peftcore.tuners.adalora import RankAllocator
from torch import Tensor, nn

import peftcore
from peftcore import AdaLoraModel, ConfigError, PeftError, get_peft_model, get_peft_model_state_dict
from peftcore.errors import OptionTypeError

LIBRARIES = (peft, peftcore)
STEPS = 9


def net(library: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 7)).double()
    defaults = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2, "total_step": STEPS, "target_modules": ["0", "1"]}
    return library.get_peft_model(plain, library.AdaLoraConfig(**{**defaults, **options}), autocast_adapter_dtype=False)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(32, n, dtype=torch.float64, generator=generator) for n in (10, 7))  # type: ignore[return-value]


def trained(library: Any, steps: int = STEPS) -> Any:
    model = net(library)
    # HF PEFT's ranknum is a count, but it gets gradients
    factors = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    x, y = batch()
    for step in range(1, steps + 1):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def patterns(model: Any) -> dict[str, list[bool]]:
    return {name.removesuffix(".default"): mask for name, mask in model.peft_config["default"].rank_pattern.items()}


def test_a_trained_adapter_shrinks_to_the_same_triplets_as_in_peft() -> None:
    models = {library: trained(library) for library in LIBRARIES}
    assert patterns(models[peftcore]) == patterns(models[peft])
    ranks: dict[Any, list[int]] = {}
    outputs = {}
    for library, model in models.items():
        before = model(batch()[0])
        model.resize_modules_by_rank_pattern(model.peft_config["default"].rank_pattern, "default")
        torch.testing.assert_close(model(batch()[0]), before)
        layers = [model.base_model.model[number] for number in (0, 1)]
        ranks[library] = [len(layer.lora_E["default"]) for layer in layers]
        assert [layer.lora_B["default"].shape[1] for layer in layers] == ranks[library]
        outputs[library] = before
    assert ranks[peftcore] == ranks[peft] and sum(ranks[peft]) == 4
    torch.testing.assert_close(outputs[peftcore], outputs[peft], rtol=0, atol=1e-9)
    ours = models[peftcore]
    assert all(p.requires_grad for n, p in ours.named_parameters() if "lora_" in n)
    assert [len(t) for n, t in get_peft_model_state_dict(ours).items() if "lora_E" in n] == ranks[peft]
    ours(batch()[0]).sum().backward()
    ours.base_model.update_and_allocate(STEPS + 1)  # the adapter stays as it is
    assert ours.adapter_ranks() == dict(zip("01", ranks[peft], strict=True))


def test_a_shrunken_adapter_shrinks_again_and_is_saved_with_masks_of_all_triplets(tmp_path: Any) -> None:
    model = trained(peftcore)
    x = batch()[0]
    model.base_model.resize_modules_by_rank_pattern({"0.lora_E": [True, False] * 3}, "default")
    model.base_model.resize_modules_by_rank_pattern({"0.lora_E.default": torch.tensor([True, False, True])}, "default")
    expected = model(x)
    assert model.adapter_ranks()["0"] == 2
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 7)).double()
    loaded = peftcore.PeftModel.from_pretrained(plain, tmp_path)
    assert loaded.peft_config["default"].rank_pattern["0.lora_E"] == [True, False, False, False, True, False]
    torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)


def test_a_state_dict_shrinks_as_in_peft() -> None:
    keys = {"lora_A": (6, 10), "lora_B": (8, 6), "lora_E": (6, 1)}
    masks = {"0.lora_E.default": [True, False, False, True, False, False], "1.lora_E": [True, True]}
    shrunken = []
    for library in LIBRARIES:
        generator = torch.Generator().manual_seed(2)
        state = {
            f"base_model.model.0.{key}.default": torch.randn(shape, generator=generator) for key, shape in keys.items()
        }
        state |= {
            "base_model.model.1.lora_A.default": torch.ones(2, 8),
            "base_model.model.1.lora_B.default": torch.ones(7, 2),
            "base_model.model.1.lora_E.default": torch.ones(2, 1),
        }
        result = net(library).resize_state_dict_by_rank_pattern(masks, state, "default")
        assert result is state
        shrunken.append(result)
    assert shrunken[0].keys() == shrunken[1].keys()
    assert all(torch.equal(shrunken[0][key], shrunken[1][key]) for key in shrunken[0])
    assert shrunken[0]["base_model.model.0.lora_B.default"].shape == (8, 2)


def test_an_allocator_has_pefts_schedule_and_scores() -> None:
    models = {library: trained(library, 4) for library in LIBRARIES}
    ours, theirs = (models[library].base_model.rankallocator for library in (peftcore, peft))
    assert type(theirs) is TheirAllocator and type(ours) is RankAllocator
    assert [ours.budget_schedule(step) for step in range(1, 12)] == [theirs.budget_schedule(s) for s in range(1, 12)]
    assert (ours.init_bgt, ours.target_bgt, ours.name_set) == (theirs.init_bgt, theirs.target_bgt, theirs.name_set)
    assert (ours.beta1, ours.beta2) == (theirs.beta1, theirs.beta2)
    for attribute in ("exp_avg_ipt", "exp_avg_unc"):
        mine, others = getattr(ours, attribute), getattr(theirs, attribute)
        assert mine.keys() == {name for name in others if "ranknum" not in name}
        for name in mine:
            torch.testing.assert_close(mine[name].double(), others[name], rtol=1e-5, atol=1e-9)
    x, y = batch()
    allocations = []
    for library, allocator in ((peftcore, ours), (peft, theirs)):
        model = models[library]
        (model(x) - y).square().mean().backward()
        inner = model.base_model.model
        allocated = [allocator.update_and_allocate(inner, 5)]
        model.peft_config["default"].deltaT = 2
        for step, force_mask in ((2, False), (5, False), (5, True)):
            allocated.append(allocator.update_and_allocate(inner, step, force_mask))
        allocations.append((allocated, allocator.mask_to_budget(inner, 3)))
        allocator.mask_using_rank_pattern(inner, {"0.lora_E": [True] * 6, "1.lora_E": [False] * 6})
        assert not model.base_model.model[1].lora_E["default"].any()
        allocator.reset_ipt()
        assert not allocator.exp_avg_ipt
        allocator.set_total_step(20)
        assert model.peft_config["default"].total_step == 20
    assert allocations[0] == allocations[1] and allocations[0][0][2][1] is None


def test_what_does_not_fit_is_refused() -> None:
    model = net(peftcore)
    view = model.base_model
    assert isinstance(view, AdaLoraModel) and view.trainable_adapter_name == "default"
    for pattern, message in (
        ({"2.lora_E": [True] * 6}, "2.lora_E is no layer of 'default'; it adapts 0, 1"),
        ({"0.lora_E": [True] * 5}, "must have 6 entries, the rank; got 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            view.resize_modules_by_rank_pattern(pattern, "default")  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="must be a list or a tensor; got str"):
        view.resize_modules_by_rank_pattern({"0.lora_E": "110"}, "default")  # type: ignore[dict-item]
    with pytest.raises(PeftError, match="mask_to_budget cannot be replaced"):
        RankAllocator.mask_to_budget = None  # type: ignore[assignment,method-assign]
    allocator = view.rankallocator
    model.add_adapter("other", peftcore.LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="'other' is no AdaLoRA, but LORA"):
        RankAllocator(model, model.peft_config["default"], "other")
    model.set_adapter("other")
    with pytest.raises(peftcore.AdapterNameError, match="no AdaLoRA is active"):
        _ = view.rankallocator
    model.delete_adapter("default")
    model.add_adapter("default", net(peftcore).peft_config["default"])
    with pytest.raises(PeftError, match="make a new allocator"):
        allocator.mask_to_budget(model, 3)


def test_other_methods_have_no_such_methods() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftcore.LoraConfig(target_modules=["0"]))
    assert not hasattr(model, "resize_modules_by_rank_pattern") and not hasattr(model.base_model, "rankallocator")
