"""`add_weighted_adapter` makes of the same adapters what HF `peft` makes of them, or what its formula says."""

import copy
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import AdapterNameError, ConfigError, LoraConfig, PeftError, PeftModel
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging.weighted import KINDS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

OPTIONS: dict[str, dict[str, Any]] = {
    kind: {} if kind in ("svd", "cat", "linear") else {"density": 0.6} for kind in KINDS
}
CASES = [
    ("all-linear", {}, {}),
    ("all-linear", {"lora_alpha": 3}, {"lora_alpha": 5, "use_rslora": True}),
]
WEIGHTS = [[0.7, 0.3], [1.5, -0.5]]


def seen_bernoulli(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Bernoulli that depends on what it is asked for alone: both sides draw at different moments."""
    whole = torch.bernoulli

    def drawn(chance: Tensor, **_options: Any) -> Tensor:
        numel, share = chance.numel(), float(chance.flatten()[0])
        own = whole(torch.full((numel,), share), generator=torch.Generator().manual_seed(numel))
        return own.view(chance.shape).to(chance)

    monkeypatch.setattr(torch, "bernoulli", drawn)


def both(net: Any, folder: Path, options: dict[str, Any], others: dict[str, Any]) -> tuple[Any, Any]:
    """The same two adapters in PEFT's model and in ours."""
    configs = [peft.LoraConfig(**{"r": 4, **own}) for own in (options, others)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(copy.deepcopy(net), configs[0], "a")
        theirs.add_adapter("b", configs[1])
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter += 0.3 * torch.randn_like(parameter)
        theirs.save_pretrained(folder, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(copy.deepcopy(net), folder / "a", "a")
    ours.load_adapter(folder / "b", "b")
    return theirs, ours


def add(model: Any, *arguments: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(*arguments, **options)


def agree(theirs: Any, ours: Any, tolerance: float = 1e-6) -> None:
    """Every layer's ΔW of the adapter "m". PEFT keeps weights in float32, hence the tolerance."""
    adapters = adapter_set(ours).adapters("m")
    assert adapters
    for path, adapter in adapters.items():
        layer = theirs.base_model.model.get_submodule(path)
        expected = layer.get_delta_weight("m").detach()
        found = adapter.delta_weight().detach()
        found = found.T if type(adapter.base).__name__ in ("Conv1DWeight", "EmbeddingWeight") else found
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), path
        assert expected.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_kind_on_a_llama(
    kind: str, number: int, weights: list[float], llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, options, others = CASES[number]
    theirs, ours = both(
        llama(), tmp_path, {"target_modules": targets, **options}, {"target_modules": targets, **others}
    )
    seen_bernoulli(monkeypatch)
    for model in (theirs, ours):
        add(model, ["a", "b"], weights, "m", kind, **OPTIONS[kind])
    agree(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_kind_of_layer_that_peft_combines(
    kind: str, kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's svd kinds fail on Conv1d and Conv3d, and DARE's masks are drawn there in the layer's own orientation."""
    layers = ["linear", "plane", "point"]
    layers += ["line", "space"] if not kind.endswith("svd") else []
    layers += ["embedding", "turned"] if not (kind.startswith("dare") and kind.endswith("svd")) else []
    options = {"target_modules": layers}
    theirs, ours = both(kinds(), tmp_path, options, options)
    seen_bernoulli(monkeypatch)
    for model in (theirs, ours):
        add(model, ["a", "b"], [0.7, 0.4], "m", kind, **OPTIONS[kind])
    agree(theirs, ours)
    assert set(adapter_set(ours).adapters("m")) == set(layers)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_both_ways_to_elect(
    kind: str, majority: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = both(llama(), tmp_path, {"target_modules": "all-linear"}, {"target_modules": "all-linear"})
    seen_bernoulli(monkeypatch)
    for model in (theirs, ours):
        add(model, ["a", "b"], [1.0, 0.5], "m", kind, density=0.5, majority_sign_method=majority)
    agree(theirs, ours)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
def test_different_ranks_and_layers(kind: str, llama: Any, tmp_path: Path) -> None:
    """A layer that one adapter leaves alone is combined as if its change there were zero."""
    others = {"r": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 6}}
    theirs, ours = both(llama(), tmp_path, {"target_modules": ["q_proj", "v_proj"]}, others)
    for model in (theirs, ours):
        add(model, ["a", "b"], [0.7, 0.4], "m", kind, **OPTIONS[kind])
    agree(theirs, ours)
    assert {path.rpartition(".")[2] for path in adapter_set(ours).adapters("m")} == {"q_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_rank(rank: int, llama: Any, tmp_path: Path) -> None:
    theirs, ours = both(llama(), tmp_path, {"target_modules": "all-linear"}, {"target_modules": "all-linear"})
    for model in (theirs, ours):
        add(model, ["a", "b"], [0.7, 0.4], "m", "svd", svd_rank=rank, svd_full_matrices=False)
    agree(theirs, ours)
    assert ours.peft_config["m"].r == rank == ours.peft_config["m"].lora_alpha


def test_more_rank_than_there_is_costs_nothing(linears: Any) -> None:
    """PEFT fills up with singular vectors of zeros; here a layer gets what it needs."""
    model = linears(a={"r": 2}, b={"r": 3})
    report = model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", svd_rank=8)
    assert set(report.ranks.values()) == {5} and report.error == 0


def test_svd_clamp_is_the_quantile_of_both_factors(linears: Any) -> None:
    """The signs of singular vectors are anybody's choice, and PEFT's quantile depends on them: so by the formula."""
    model = linears(a={}, b={})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "whole", "svd")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "m", "svd", svd_clamp=0.8)
    for path, clamped in adapter_set(model).adapters("m").items():
        u, s, vh = torch.linalg.svd(adapter_set(model).adapters("whole")[path].delta_weight(), full_matrices=False)
        signs = torch.stack([row[row.abs().argmax()].sign() for row in vh[:4]])
        a, b = vh[:4] * signs[:, None], u[:, :4] * s[:4] * signs
        most = torch.quantile(torch.cat([a.flatten(), b.flatten()]), 0.8)
        assert torch.allclose(clamped.lora_A_weight, a.clamp(-most, most), atol=1e-10)
        assert torch.allclose(clamped.lora_B_weight, b.clamp(-most, most), atol=1e-10)
        assert (b.abs() > most).any()


def test_linear_weighs_each_factor_by_the_root_and_keeps_the_sign(linears: Any) -> None:
    """Weights on both A and B would make them squares, and the sign on both would make it go."""
    model = linears(a={"lora_alpha": 6}, b={"lora_alpha": 3})
    for weights, name in (([2.0, 0.0], "twice"), ([-0.5, 0.0], "less")):
        model.add_weighted_adapter(["a", "b"], weights, name, "linear")
        for path, made in adapter_set(model).adapters(name).items():
            own = adapter_set(model).adapters("a")[path].delta_weight()
            assert torch.allclose(made.delta_weight(), weights[0] * own, atol=1e-12)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", "linear")
    for path, made in adapter_set(model).adapters("both").items():
        a, b = (adapter_set(model).adapters(name)[path] for name in ("a", "b"))
        one, other = math.sqrt(0.7 * 6 / 4), math.sqrt(0.3 * 3 / 4)
        expected = (one * a.lora_B_weight + other * b.lora_B_weight) @ (one * a.lora_A_weight - other * b.lora_A_weight)
        assert torch.allclose(made.delta_weight(), expected, atol=1e-12)


def test_one_adapter_alone_is_pruned_as_asked(linears: Any) -> None:
    """PEFT takes "linear" for a single adapter whatever was asked for, and leaves density and svd_rank aside."""
    model = linears(a={})
    model.add_weighted_adapter(["a"], [1.0], "m", "magnitude_prune", density=0.25)
    model.add_weighted_adapter(["a"], [1.0], "thin", "svd", svd_rank=2)
    for path, made in adapter_set(model).adapters("m").items():
        assert (made.lora_A_weight == 0).sum() == made.lora_A_weight.numel() - made.lora_A_weight.numel() // 4, path
    assert {adapter.r for adapter in adapter_set(model).adapters("thin").values()} == {2}


def test_dare_divides_by_the_density(linears: Any) -> None:
    """So that the expected change is the whole one; without it the mean would be 0.3 of it."""
    model = linears(a={}, b={})
    total: dict[str, Tensor] = {}
    torch.manual_seed(0)
    for _ in range(400):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "m", "dare_linear_svd", svd_rank=8, density=0.3)
        for path, made in adapter_set(model).adapters("m").items():
            total[path] = total.get(path, 0) + made.delta_weight().detach() / 400
        model.delete_adapter("m")
    for path, mean in total.items():
        a, b = (adapter_set(model).adapters(name)[path].delta_weight() for name in ("a", "b"))
        expected = a + 0.5 * b
        assert abs((mean * expected).sum() / expected.square().sum() - 1) < 0.05


def test_dare_of_an_embedding(kinds: Any, with_adapters: Any) -> None:
    """The mask is Bernoulli(density)/density over ΔW: each element is 0 or ΔW/density."""
    model = with_adapters(kinds(), a=LoraConfig(r=2, target_modules=["embedding"]))
    model.add_weighted_adapter(["a"], [1.0], "m", "dare_linear_svd", svd_rank=8, density=0.5)
    made, own = (adapter_set(model).adapters(name)["embedding"].delta_weight() for name in ("m", "a"))
    kept = made.abs() > 1e-9
    assert torch.allclose(made[kept], 2 * own[kept], atol=1e-9) and 0.3 < kept.double().mean() < 0.7


def test_a_weight_given_twice_adds_up(linears: Any) -> None:
    model = linears(a={})
    model.add_weighted_adapter(["a", "a"], [0.5, 0.25], "m", "svd")
    for path, made in adapter_set(model).adapters("m").items():
        expected = 0.75 * adapter_set(model).adapters("a")[path].delta_weight()
        assert torch.allclose(made.delta_weight(), expected, atol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_svd_does_not_depend_on_the_order(order: tuple[int, ...], linears: Any) -> None:
    model = linears(a={}, b={"r": 2}, c={"lora_alpha": 9})
    names, weights = ["a", "b", "c"], [0.5, -1.0, 2.0]
    model.add_weighted_adapter(names, weights, "one", "svd")
    model.add_weighted_adapter([names[i] for i in order], [weights[i] for i in order], "other", "svd")
    for path, one in adapter_set(model).adapters("one").items():
        other = adapter_set(model).adapters("other")[path]
        assert torch.allclose(one.delta_weight(), other.delta_weight(), atol=1e-12)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"adapter_name": "b"}, AdapterNameError, "an adapter named .b. exists already"),
        ({"adapter_name": "x.y"}, AdapterNameError, r"must not be empty or contain '\.'"),
        ({"adapters": ["a", "z"]}, AdapterNameError, "Adapter z does not exist; loaded: a, b"),
        ({"adapters": [], "weights": []}, ConfigError, "no adapters to merge"),
        ({"weights": [1.0]}, ConfigError, "got 2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, ConfigError, "weights must be finite numbers; got nan"),
        ({"weights": [1.0, "1"]}, ConfigError, "weights must be finite numbers; got '1'"),
        ({"combination_type": "tie"}, ConfigError, "'tie' is unknown; did you mean 'ties'"),
        ({"combination_type": "ties"}, ConfigError, "density .* must be above 0 and at most 1, .* got None"),
        ({"combination_type": "ties_svd", "density": 0.0}, ConfigError, r"got 0\.0; try"),
        ({"combination_type": "dare_linear", "density": 1.1}, ConfigError, r"got 1\.1; try"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, ConfigError, "got 'most'"),
        ({"combination_type": "linear"}, ConfigError, "factors of the same rank; at 0 they are {'a': 4, 'b': 3}"),
        ({"svd_rank": 0}, ConfigError, "svd_rank must be an integer from 1 to 8, .* got 0"),
        ({"svd_rank": 9}, ConfigError, "svd_rank must be an integer from 1 to 8, .* got 9"),
        ({"svd_rank": 2.0}, ConfigError, r"svd_rank must be an integer .* got 2\.0"),
        ({"svd_clamp": 0.3}, ConfigError, r"svd_clamp is a quantile above 0\.5 .* got 0\.3"),
        ({"svd_driver": "fast"}, ConfigError, "svd_driver must be .* got 'fast'"),
    ],
    ids=str,
)
def test_of_weighted(given: dict[str, Any], kind: type[PeftError], message: str, linears: Any, refused: Any) -> None:
    model = linears(a={}, b={"r": 3})
    options = {"adapters": ["a", "b"], "weights": [1.0, 0.5], "adapter_name": "m", **given}
    refused(model, kind, message, lambda: model.add_weighted_adapter(**options))
