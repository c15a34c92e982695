"""Whatever an adapter is, combining it takes what it computes: f(x) + Σ w (f_a(x) − f(x))."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from quantised_layers import quantised
from torch import Tensor, nn

from peftcore import AdaLoraConfig, ConfigError, LoraConfig, MergeError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging import Recipe
from peftcore.registry import methods

EXAMPLES = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and example.merges and not example.whole_model
}
KINDS = {"embedding": (), "linear": (12,), "turned": (12,), "line": (6, 9), "point": (6, 5, 5), "plane": (6, 5, 5)}
KINDS["space"] = (4, 4, 4, 4)
SUM = Recipe.task_arithmetic()


def outputs(model: Any, layer: Any, x: Tensor, *names: str) -> list[Tensor]:
    """The base's output, and each adapter's alone."""
    found = []
    with torch.no_grad():
        with model.disable_adapter():
            found.append(layer(x))
        for name in names:
            model.set_adapter(name)
            found.append(layer(x))
    return found


def combines(model: Any, layer: Any, x: Tensor, weights: dict[str, float], atol: float = 1e-8) -> None:
    base, made, *own = outputs(model, layer, x, "m", *weights)
    expected = base + sum(w * (y - base) for w, y in zip(weights.values(), own, strict=True))
    assert torch.allclose(made, expected, atol=atol)
    assert (made - base).abs().max() > 1e-2


@pytest.mark.parametrize("method", EXAMPLES)
def test_any_method_that_merges_becomes_a_lora(method: str) -> None:
    """With the bias it changes, if it does."""
    torch.manual_seed(0)
    net: Any = get_peft_model(
        nn.Sequential(nn.Linear(12, 8)).double(), EXAMPLES[method].make(target_modules=["0"]), "a"
    )
    randomise(net, EXAMPLES[method].spread)
    net.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    report = net.add_merged("m", {"a": 0.5, "b": -1.5}, SUM, rank=8)
    assert report.error < 1e-7 and net.peft_config["m"].peft_type == "LORA"
    combines(net.eval(), net, torch.randn(5, 12).double(), {"a": 0.5, "b": -1.5}, atol=1e-6)


def test_a_method_without_ranks_needs_one_and_says_what_it_lost(snapshot: Any) -> None:
    net: Any = get_peft_model(
        nn.Sequential(nn.Linear(12, 8)).double(), EXAMPLES["LOHA"].make(target_modules=["0"]), "a"
    )
    randomise(net, 0.3)
    with pytest.raises(ConfigError, match=r"'a' \(LOHA\) has no rank .* give a rank"):
        net.add_merged("m", {"a": 1.0}, SUM)
    report = net.add_merged("m", {"a": 1.0}, SUM, rank=1)
    own = adapter_set(net).adapters("a")["0"].delta_weight().detach()
    s = torch.linalg.svdvals(own)
    assert report.errors["0"] == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-8) and report.error > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, kinds: Any, with_adapters: Any) -> None:
    a = LoraConfig(r=3, target_modules=[kind], lora_alpha=5)
    b = LoraConfig(r=2, target_modules=[kind], use_rslora=True)
    model = with_adapters(kinds(), a=a, b=b)
    x = torch.randn(2, *KINDS[kind]).double() if KINDS[kind] else torch.arange(20)
    for recipe, rank in ((SUM, None), (Recipe.magnitude_prune(1.0), 6)):
        model.add_merged("m", {"a": 0.5, "b": -1.5}, recipe, rank=rank)
        combines(model, model.get_submodule(kind), x, {"a": 0.5, "b": -1.5})
        model.delete_adapter("m")


def test_patterns_and_rslora_whichever_comes_first(linears: Any) -> None:
    """PEFT keeps use_rslora of the first adapter, so that its result is √r times too large."""
    options = {"use_rslora": True, "rank_pattern": {"1": 2}, "alpha_pattern": {"0": 7.0}}
    for order in (("a", "b"), ("b", "a")):
        model = linears(a=options, b={"lora_alpha": 3})
        for kind in ("svd", "cat"):
            model.add_weighted_adapter(list(order), [0.5, 2.0], "m", kind, svd_rank=8 if kind == "svd" else None)
            ways = adapter_set(model).adapters
            for path, made in ways("m").items():
                assert made.scaling == 1
                expected = 0.5 * ways(order[0])[path].delta_weight() + 2 * ways(order[1])[path].delta_weight()
                assert torch.allclose(made.delta_weight(), expected, atol=1e-12)
            model.delete_adapter("m")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_was_taken_out_of_the_base(start: str, linears: Any) -> None:
    model = linears(a={"init_lora_weights": start, "r": 2}, b={"r": 2})
    for kind in ("svd", "cat"):
        model.add_weighted_adapter(["a", "b"], [0.5, -1.5], "m", kind)
        for path, made in adapter_set(model).adapters("m").items():
            a, b = (adapter_set(model).adapters(name)[path].delta_weight() for name in "ab")
            u, s, vh = torch.linalg.svd(0.5 * a - 1.5 * b, full_matrices=False)
            r = 4 if kind == "svd" else 6
            assert torch.allclose(made.delta_weight(), (u[:, :r] * s[:r]) @ vh[:r], atol=1e-10)
        model.delete_adapter("m")


def test_dora_is_combined_as_what_it_computes(linears: Any) -> None:
    """W' − W of DoRA has full rank, so a rank has an error, which is told; its factors alone are not its change."""
    model = linears(a={"use_dora": True, "target_modules": ["0"]}, b={"target_modules": ["0"]})
    report = model.add_merged("m", {"a": 0.5, "b": -1.5}, SUM, rank=8)
    assert report.error < 1e-7
    combines(model, model[0], torch.randn(5, 12).double(), {"a": 0.5, "b": -1.5}, atol=1e-6)
    assert model.add_merged("thin", {"a": 1.0}, SUM).ranks == {"0": 4}
    assert model.add_merged("thinner", {"a": 1.0}, SUM, rank=2).error > 0.01
    for kind in ("linear", "cat", "ties"):
        with pytest.raises(ConfigError, match=f"'{kind}' needs the factors A and B, .* adapter 'a' at 0 .*take 'svd'"):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n", kind, density=0.5 if kind == "ties" else None)


def test_adalora_is_exact_by_its_factors(with_adapters: Any) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0"], lora_alpha=12)
    model = with_adapters(nn.Sequential(nn.Linear(12, 8)).double(), a=config)
    assert model.add_merged("m", {"a": -2.0}, SUM).ranks == {"0": 4}
    combines(model, model, torch.randn(5, 12).double(), {"a": -2.0})


def test_biases_of_lora_are_combined_too(linears: Any) -> None:
    """PEFT drops them without a word."""
    model = linears(a={"lora_bias": True, "lora_alpha": 6}, b={"lora_bias": True}, c={})
    for name, arguments in {"cat": (), "svd": (8,)}.items():
        model.add_weighted_adapter(["a", "b", "c"], [0.5, -1.5, 1.0], "m", name, *arguments)
        assert model.peft_config["m"].lora_bias
        combines(model, model[0], torch.randn(5, 12).double(), {"a": 0.5, "b": -1.5, "c": 1.0})
        model.delete_adapter("m")


@pytest.mark.parametrize("storage", ["nf4", "nf4+double", "int8", "Q4_1"])
def test_a_quantised_base(storage: str) -> None:
    """LoRA's factors do not ask what the base is; DoRA's change is that of the dequantised weight."""
    torch.manual_seed(0)
    net: Any = get_peft_model(nn.Sequential(quantised(storage)), LoraConfig(r=4, target_modules=["0"]), "a")
    net.add_adapter("b", LoraConfig(r=2, target_modules=["0"], use_dora=True))
    randomise(net, 0.1)
    for recipe, rank in ((SUM, 32), (Recipe.ties(1.0), 32)):
        net.add_merged("m", {"a": 0.5, "b": 1.5}, recipe, rank=rank)
        ways = adapter_set(net).adapters
        weight = ways("b")["0"].base.read_unmerged().double()
        a, b = (ways(name)["0"].merged_weight(weight) - weight for name in "ab")
        agree = 0.5 * a + 1.5 * b
        n = 0.5 * (a * agree > 0) + 1.5 * (b * agree > 0)
        ties = (0.5 * a * (a * agree > 0) + 1.5 * b * (b * agree > 0)) / n
        expected = agree if recipe is SUM else ties
        assert torch.allclose(ways("m")["0"].delta_weight().double(), expected, atol=1e-5)
        net.delete_adapter("m")
    net.eval()(torch.randn(3, 64))


def test_while_another_adapter_is_merged_into_the_base(linears: Any, changes: Any) -> None:
    model = linears(a={"use_dora": True}, b={})
    before = changes(model, "a")["0"]
    model.merge_adapter(["b"])
    model.add_merged("m", {"a": 1.0}, SUM, rank=8)
    model.unmerge_adapter()
    assert torch.allclose(changes(model, "m")["0"], before, atol=1e-8)


def test_tied_embedding_and_head_that_follow_each_other(llama: Any, with_adapters: Any) -> None:
    options: Any = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = with_adapters(llama(tie_word_embeddings=True), a=LoraConfig(r=2, **options), b=LoraConfig(r=3, **options))
    model.add_merged("m", {"a": 0.5, "b": -1.5}, SUM)
    for path in ("lm_head", "model.embed_tokens"):
        ways = adapter_set(model).adapters
        a, b, made = (ways(name)[path].delta_weight() for name in ("a", "b", "m"))
        assert torch.allclose(made, 0.5 * a - 1.5 * b, atol=1e-12)


def test_a_layer_that_stands_at_two_places(with_adapters: Any, tmp_path: Path) -> None:
    def net() -> Any:
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        return nn.ModuleDict({"one": layer, "other": layer, "third": nn.Linear(8, 8)}).double()

    options: Any = {"target_modules": ["one", "other", "third"]}
    model = with_adapters(net(), a=LoraConfig(r=2, **options), b=LoraConfig(r=3, **options))
    model.add_merged("m", {"a": 0.5, "b": -1.5}, SUM)
    assert model.one is model.other
    for layer in (model.one, model.third):
        combines(model, layer, torch.randn(5, 8).double(), {"a": 0.5, "b": -1.5})
    model.save_pretrained(tmp_path, selected_adapters=["m"])
    model.set_adapter("m")
    loaded, x = PeftModel.from_pretrained(net(), tmp_path / "m").eval(), torch.randn(5, 8).double()
    assert torch.equal(loaded.one(x), model.one(x))


def test_raw_parameters(with_adapters: Any) -> None:
    """Of an nn.MultiheadAttention, whose output projection counts twice, and stacked experts, one SVD for each."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 6, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x

    torch.manual_seed(0)
    options: Any = {"target_modules": ["attention"], "target_parameters": ["weights"]}
    net = nn.ModuleDict({"experts": Experts(), "attention": nn.MultiheadAttention(8, 2)}).double()
    model = with_adapters(net, a=LoraConfig(r=2, **options), b=LoraConfig(r=1, lora_alpha=5, **options))
    ways = adapter_set(model).adapters
    for recipe, rank in ((SUM, None), (SUM, 3), (Recipe.magnitude_prune(1.0), 6)):
        report = model.add_merged("m", {"a": 0.5, "b": -1.5}, recipe, rank)
        assert set(report.ranks) == {
            *("attention.in_proj_weight", "attention.out_proj.weight", "experts.weights"),
        }
        for path, made in ways("m").items():
            a, b = (ways(name)[path].delta_weight() for name in "ab")
            assert torch.allclose(made.delta_weight(), 0.5 * a - 1.5 * b, atol=1e-9), path
        model.delete_adapter("m")


# -- what cannot be a LoRA -------------------------------------------------------------------------------------------


def test_refused_with_the_reason_and_nothing_half_made(llama: Any, snapshot: Any) -> None:
    names = {"target_modules": ["q_proj"]}
    cases = {
        "aLoRA acts at some positions only": LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM", **names),
        "is a prompt, which changes no weight": methods()["PROMPT_TUNING"].config(num_virtual_tokens=2),
        "norm layer, which LoRA does not support": methods()["LN_TUNING"].config(),
    }
    for message, config in cases.items():
        model: Any = get_peft_model(llama(), LoraConfig(r=2, **names), "a")
        model.add_adapter("b", config)
        before = snapshot(model)
        for call in (
            lambda m=model: m.add_merged("m", {"a": 1.0, "b": 1.0}, SUM, rank=2),
            lambda m=model: m.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", "svd"),
        ):
            with pytest.raises(MergeError, match=message):
                call()
        after = snapshot(model)
        assert before[:-1] == after[:-1] and all(map(torch.equal, before[-1], after[-1]))


def test_a_convolution_with_groups(with_adapters: Any) -> None:
    net = nn.Sequential(nn.Conv1d(6, 8, 3, groups=2)).double()
    model = with_adapters(net, a=LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(MergeError, match="'a' changes 0, a convolution with groups"):
        model.add_merged("m", {"a": 1.0}, SUM)


def test_an_adapter_that_is_sharded_over_processes(linears: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linears(a={})
    monkeypatch.setattr("peftcore.merging.weight_changes.is_sharded", lambda _tensor: True)
    with pytest.raises(MergeError, match=r"'a' is sharded over processes \(FSDP\); save it"):
        model.add_merged("m", {"a": 1.0}, SUM)


def test_biases_where_a_lora_with_biases_does_not_fit(kinds: Any, with_adapters: Any, snapshot: Any) -> None:
    a, b = LoraConfig(r=2, target_modules=["linear"], lora_bias=True), LoraConfig(r=2, target_modules=["embedding"])
    model = with_adapters(kinds(), a=a, b=b)
    with pytest.raises(MergeError, match=r"the bias of linear changes, .* cannot target embedding"):
        model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM)
    assert list(model.peft_config) == ["a", "b"]


def test_numbers_that_are_not_finite(linears: Any, snapshot: Any) -> None:
    model = linears(a={}, b={})
    with torch.no_grad():
        adapter_set(model).adapters("b")["1"].lora_B_weight[0, 0] = float("nan")
    before = snapshot(model)
    for kind in ("svd", "cat", "linear", "magnitude_prune_svd"):
        with pytest.raises(MergeError, match="NaN or Inf, so nothing was added"):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", kind, density=0.5 if "prune" in kind else None)
    assert before[:-1] == snapshot(model)[:-1]
