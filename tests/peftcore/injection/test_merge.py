"""What merging writes, in which type, what it keeps, and what it does to tied weights."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from quantised_layers import quantised
from tiny_models import tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import (
    AdapterNameError,
    LoraConfig,
    MergeError,
    RoutingError,
    TrainableTokensConfig,
    check_mergeable,
    get_peft_model,
)
from peftcore.injection import merge
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods

EXAMPLES = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and example.merges and not example.whole_model
}


def adapt(net: nn.Module, method: str = "LORA", **options: Any) -> Any:
    net = get_peft_model(net, EXAMPLES[method].make(**{"target_modules": ["0"], **options}))
    randomise(net, EXAMPLES[method].spread)
    return net


def test_merging_what_is_merged_changes_nothing_and_warns() -> None:
    net = adapt(nn.Sequential(nn.Linear(12, 8)), "LORA", init_lora_weights=False)
    net.merge_adapter()
    weight = net[0].base_layer.weight.clone()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        net.merge_adapter()
    assert torch.equal(net[0].base_layer.weight, weight)


def test_unmerging_what_is_not_merged_and_merging_twice_warn_in_the_words_of_hf_peft() -> None:
    """So that `warnings.filterwarnings("ignore", message="Already unmerged")` of a script still acts."""
    net = adapt(nn.Sequential(nn.Linear(12, 8)), "LORA", init_lora_weights=False)
    net.add_adapter("other", EXAMPLES["LORA"].make(target_modules=["0"]))
    for unmerge in (net.unmerge_adapter, net[0].unmerge):
        with pytest.warns(UserWarning, match="^Already unmerged"):
            unmerge()
    net.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="^Already following adapters were merged: default. Now merged as well: other"):
        net.merge_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="^All adapters are already merged"):
        net[0].merge()


# -- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", EXAMPLES)
def test_half_precision_is_merged_in_float32_and_rounded_once(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = adapt(nn.Sequential(nn.Linear(12, 8)).to(dtype), method)
    net.set_requires_grad("default", False)
    net.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    net.set_adapter(["default", "b"])
    weight = net[0].base_layer.weight.float()
    for name in ("default", "b"):
        weight = adapter_set(net).adapters(name)["0"].merged_weight(weight)
    net.merge_adapter()
    assert net[0].base_layer.weight.dtype == dtype and torch.equal(net[0].base_layer.weight, weight.to(dtype))


def test_safe_merge_sees_what_overflows_in_the_bases_own_type() -> None:
    """65504 is float16's largest number; float32, in which the sum is made, holds it easily."""
    for dtype, fits in ((torch.float16, False), (torch.bfloat16, True)):
        net = adapt(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).to(dtype), target_modules=["0", "1"])
        with torch.no_grad():
            adapter_set(net).adapters("default")["1"].lora_B_weight.fill_(1e5)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        if fits:
            net.merge_adapter(safe_merge=True)
            continue
        with pytest.raises(MergeError, match=r"merging 'default' into 1 gives NaN or Inf in torch\.float16"):
            net.merge_adapter(safe_merge=True)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_safe_merge_names_the_adapter_that_breaks_a_mixture() -> None:
    net = adapt(nn.Sequential(nn.Linear(12, 12)).half())
    net.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    net.set_adapter(["default", "b"])
    for name in ("default", "b"):  # 40,000 each: either alone fits
        adapter = adapter_set(net).adapters(name)["0"]
        with torch.no_grad():
            adapter.lora_A_weight.fill_(1.0)
            adapter.lora_B_weight.fill_(40000 / adapter.r / adapter.scaling)
        net.merge_adapter([name], safe_merge=True)
        net.unmerge_adapter()
    with pytest.raises(MergeError, match="merging 'b' into 0 gives NaN or Inf"):
        net.merge_adapter(safe_merge=True)


def test_safe_merge_looks_at_biases_too() -> None:
    net = adapt(nn.Sequential(nn.Linear(12, 12)), lora_bias=True)
    with torch.no_grad():
        adapter_set(net).adapters("default")["0"].lora_bias[3] = float("nan")
    bias = net[0].bias
    with pytest.raises(MergeError, match="NaN or Inf"):
        net.merge_adapter(safe_merge=True)
    assert net[0].bias is bias


def test_one_name_need_not_be_a_list() -> None:
    net = adapt(nn.Sequential(nn.Linear(12, 12)))
    net.merge_adapter("default")
    assert net[0].merged_names == ("default",)


@pytest.mark.parametrize("storage", ["nf4", "int8", "Q4_1"])
def test_lora_bias_merges_with_its_scale_into_a_quantised_layer(storage: str) -> None:
    torch.manual_seed(0)
    net = adapt(nn.Sequential(quantised(storage)), r=2, lora_alpha=6, lora_bias=True)
    bias, own = net[0].bias.clone(), adapter_set(net).adapters("default")["0"].lora_bias.detach()
    net.merge_adapter()
    torch.testing.assert_close(net[0].bias, bias + 3 * own)
    net.unmerge_adapter()
    assert torch.equal(net[0].bias, bias)


# -- what is merged ------------------------------------------------------------------------------------------------


def two_layers() -> tuple[nn.Module, Any, torch.Tensor]:
    """A base, the same with two adapters of which "b" sits on the second layer only, and an input."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    net.add_adapter("b", LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    return base, net, torch.randn(3, 6)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("twin", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_merged_model_and_its_copies_can_be_disabled_and_unmerged_on_their_own(twin: Callable[[Any], Any]) -> None:
    base, net, x = two_layers()
    net.merge_adapter(["default"])
    net.merge_adapter(["b"])
    expected, other = net(x), twin(net)
    for _ in range(2):
        with pytest.raises(RuntimeError), other.disable_adapter():
            torch.testing.assert_close(other(x), base(x), rtol=0, atol=0)
            raise RuntimeError
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with pytest.raises(MergeError, match=r"\['b'\] are merged into the base, so they cannot be deleted"):
        other.delete_adapter("b")
    other.unmerge_adapter()
    other.delete_adapter("b")
    with other.disable_adapter():
        torch.testing.assert_close(other(x), base(x), rtol=0, atol=0)
    torch.testing.assert_close(other.unload()(x), base(x), rtol=0, atol=0)
    if other is not net:
        assert net[1].merged_names == ("default", "b")
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("merged_before", [False, True])
def test_an_error_in_the_middle_of_a_merge_puts_back_what_was_written(
    merged_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, net, x = two_layers()
    if merged_before:
        net.merge_adapter(["default"])
    before, state = net(x), {name: id(parameter) for name, parameter in net.named_parameters()}
    last = adapter_set(net).adapters("b")["1"]

    def fails(_weight: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(last, "merged_weight", fails, raising=False)
    with pytest.raises(MemoryError):
        net.merge_adapter(["default", "b"])
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == state
    assert [host.merged_names for host in net] == [("default",) if merged_before else ()] * 2
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    with net.disable_adapter():
        torch.testing.assert_close(net(x), base(x), rtol=0, atol=0)
    monkeypatch.undo()
    net.merge_adapter(["default", "b"])
    torch.testing.assert_close(net.unload()(x), base(x), rtol=0, atol=0)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EXAMPLES)
def test_merging_keeps_one_copy_of_the_old_weight_and_unloading_none(method: str) -> None:
    net = adapt(nn.Sequential(nn.Linear(12, 8)), method)
    adapter = weakref.ref(adapter_set(net).adapters("default")["0"])
    part = "weight" if methods()[method].adapter.changes_weight else "bias"
    old = weakref.ref(getattr(net[0].base_layer, part))
    net.merge_adapter()
    gc.collect()
    assert old() is not None and net[0].unmerged_state[part] is old()
    plain = net.merge_and_unload()
    del net
    gc.collect()
    assert old() is None and adapter() is None
    assert set(vars(plain[0])) == set(vars(nn.Linear(12, 8))), "no attribute of ours is left on the layer"


# -- tied weights --------------------------------------------------------------------------------------------------


def tied() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENS = torch.tensor([[1, 5, 7, 29, 2]])


@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.parametrize("side, other", [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_merging_one_side_of_a_tied_pair_leaves_the_other(side: str, other: str, tmp_path: Path) -> None:
    model = get_peft_model(tied(), LoraConfig(r=2, target_modules=[side]))
    randomise(model, 0.3)
    adapted, weight = model(TOKENS).logits, tied().get_submodule(other).weight
    assert (adapted - tied()(TOKENS).logits).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, adapted)
    assert torch.equal(model.get_submodule(other).weight, weight)
    model.unmerge_adapter()
    assert model.lm_head.weight is model.model.embed_tokens.weight, "one weight again"
    with pytest.warns(UserWarning, match="tie_word_embeddings is now False"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.get_submodule(other).weight, weight)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, adapted)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
        TrainableTokensConfig(token_indices=[1, 5]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]),
    ],
    ids=["LoRA", "tokens", "LoRA and tokens"],
)
def test_a_pair_that_is_merged_alike_stays_tied(config: Any, tmp_path: Path) -> None:
    model = get_peft_model(tied(), config)
    randomise(model, 0.3)
    adapted = model(TOKENS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, adapted)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, adapted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, adapted)
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, adapted)


@pytest.mark.parametrize("model_type", ["bart", "t5", "marian"])
@pytest.mark.parametrize("targets", [["lm_head"], ["shared"], ["embed_tokens"]], ids=str)
@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.filterwarnings("ignore:tied weights of the model differ after the merge:UserWarning")
def test_a_merge_into_some_of_several_tied_weights_is_saved(
    model_type: str, targets: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = tiny(model_type, "cpu").eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    with torch.no_grad():
        merged = model.merge_and_unload()
        expected = merged(**inputs).logits
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(type(base).from_pretrained(tmp_path / "merged").eval()(**inputs).logits, expected)


def test_a_merge_outlives_a_configuration_that_ties_two_saved_weights(tmp_path: Path) -> None:
    base = tied()
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight + 1)
    base.save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    adapted = model(TOKENS).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings is now False"):
        merged = model.merge_and_unload()
    merged.tie_weights()
    torch.testing.assert_close(merged(TOKENS).logits, adapted)


def test_a_tied_base_that_keeps_its_weights_stays_tied() -> None:
    model = get_peft_model(tied(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight


# -- merged for the time of a block


def test_a_block_merges_and_gives_the_same_weights_back() -> None:
    net: Any = get_peft_model(nn.Sequential(nn.Linear(8, 6)).double(), LoraConfig(r=2, target_modules=["0"])).eval()
    randomise(net, 0.3)
    x, weight = torch.randn(3, 8, dtype=torch.float64), net[0].base_layer.weight
    expected = net(x)
    with net.merged():
        assert net[0].merged_names == ("default",)
        torch.testing.assert_close(net(x), expected)
        with pytest.raises(MergeError, match=r"\['default'\] are merged already"), net.merged():
            pass
        assert net[0].merged_names == ("default",)  # the refused block has not unmerged them
    assert not net[0].merged and net[0].base_layer.weight is weight


def test_a_block_that_fails_unmerges_too() -> None:
    net: Any = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
    weight = net[0].base_layer.weight
    with pytest.raises(ZeroDivisionError), net.merged(["default"], safe_merge=True):
        raise ZeroDivisionError
    assert not net[0].merged and net[0].base_layer.weight is weight
    with pytest.raises(AdapterNameError), net.merged(["absent"]):
        pass


# -- open routes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("route", [lambda net: net.route("b"), lambda net: net.route([None, "b", "b"])])
def test_nothing_is_merged_while_a_route_is_open(route: Callable[[Any], Any], in_thread: bool) -> None:
    """All threads share one set of weights, so each row of the route would use the merged adapter."""
    _, net, x = two_layers()

    def in_a_thread(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    with route(net):
        before = net(x)
        for merges in (net.merge_adapter, net.merge_and_unload, net[0].merge, lambda: net.merged().__enter__()):
            with pytest.raises(MergeError, match=r"a route is open .* leave the route, or wait for its end"):
                in_a_thread(merges) if in_thread else merges()
        assert torch.equal(net(x), before)
    net.merge_adapter()
    assert net[0].merged_names == ("default",)


def test_nothing_is_merged_while_another_thread_is_inside_of_disable_adapter() -> None:
    base, net, x = two_layers()
    with net.disable_adapter(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(MergeError, match="a route is open"):
            pool.submit(net.merge_adapter).result()
        assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("inside", ["a route", "disable_adapter"])
def test_a_context_that_opens_during_a_merge_waits_for_its_end(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route is refused then, and `disable_adapter` puts the unmerged weights in place."""
    base, net, x = two_layers()
    write, threads, outputs = merge._write, ThreadPoolExecutor(1), []
    ended = threading.Event()

    def opened() -> torch.Tensor:
        with net.route("b") if inside == "a route" else net.disable_adapter():
            ended.wait(10)
            return net(x)

    def open_in_a_thread(*args: Any) -> None:
        write(*args)
        outputs.append(threads.submit(opened))
        wait(outputs, timeout=0.2)

    monkeypatch.setattr(merge, "_write", open_in_a_thread)
    with threads:
        net.merge_adapter()
        ended.set()
    if inside == "a route":
        with pytest.raises(RoutingError, match=r"\['default'\] are merged into the base"):
            outputs[0].result()
    else:
        assert torch.equal(outputs[0].result(), base(x))


def test_other_threads_call_a_model_that_was_unmerged_inside_of_disable_adapter() -> None:
    _, net, x = two_layers()
    adapted = net(x)
    net.merge_adapter()
    with net.disable_adapter(), ThreadPoolExecutor(1) as pool:
        net.unmerge_adapter()
        assert torch.equal(pool.submit(net, x).result(), adapted)


# -- a layer at several paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["all-linear"], [["0"], ["1"]]])
def test_a_layer_at_two_paths_is_merged_once(targets: list[Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    weight, net = layer.weight, nn.Sequential(layer, layer, nn.Linear(6, 6)).double()
    for name, target in zip("ab", targets, strict=False):
        net = get_peft_model(net, LoraConfig(r=2, target_modules=target, init_lora_weights=False), name)
    net.set_adapter(["a", "b"][: len(targets)])
    x = torch.randn(3, 6).double()
    expected = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), expected)
    net.unmerge_adapter()
    assert net[0].base_layer.weight is weight
    torch.testing.assert_close(net.merge_and_unload()(x), expected)


def test_the_check_before_a_merge_takes_one_name_and_knows_the_names() -> None:
    _, net, _ = two_layers()
    check_mergeable(net, "default")
    check_mergeable(net, ["default", "b"])
    for names in ("absent", ["default", "absent"]):
        with pytest.raises(AdapterNameError, match="Adapter absent does not exist; loaded: default, b"):
            check_mergeable(net, names)
    net.add_adapter("ab", LoraConfig(target_modules=["0"], alora_invocation_tokens=[1]))
    with pytest.raises(MergeError, match="'ab' cannot be merged"):
        check_mergeable(net, "ab")
