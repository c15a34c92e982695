"""One contract for every registered method: the same questions over each kind of base layer and each storage.

Asked at layer level in float64 where the storage allows (a whole model hides errors behind its norms).
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from contract_cases import CASES, EXAMPLES, LINEAR, MERGING, METHODS, UNMERGED, adapt, build, make
from method_example import examples, randomise
from net import Net
from quantised_layers import STORAGES, quantised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore import (
    CheckpointError,
    MergeError,
    PeftConfig,
    PeftModel,
    dequantize_base,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods

pytestmark = pytest.mark.filterwarnings(
    "ignore:BEFT.* has no bias", "ignore:Already (following adapters were |un)merged:UserWarning"
)


def test_every_registered_method_has_an_example() -> None:
    assert set(examples()) == {name for name, m in methods().items() if "model" not in m.adapter.layer_kinds}


@pytest.mark.parametrize("method, layer", CASES)
def test_starts_where_it_says(method: str, layer: str) -> None:
    net, x, base = build(layer)
    start = get_peft_model(net, EXAMPLES[method].make(layer, target_modules=["target"]))(x)
    if EXAMPLES[method].starts_at_base:
        torch.testing.assert_close(start, base, rtol=1e-12, atol=1e-12)
    else:
        assert not torch.allclose(start, base)


@pytest.mark.parametrize("method, layer", UNMERGED)
def test_what_cannot_merge_says_so_and_changes_nothing(method: str, layer: str) -> None:
    net, x, _ = make(method, layer)
    adapted = net(x)
    with pytest.raises(MergeError):
        net.merge_adapter()
    assert torch.equal(net(x), adapted)


@pytest.mark.parametrize("method, layer", MERGING)
def test_forward_equals_merged_weight(method: str, layer: str) -> None:
    net, x, base = make(method, layer)
    adapted = net(x)
    assert (adapted - base).abs().max() > 1e-3
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-10)


COMPILED_IN_QUICK_TESTS = ("LORA", "IA3", "OFT", "VERA")
"""One method that adds a product, one that scales, one that changes the input, and one with shared tensors."""


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize(
    "method", [m if m in COMPILED_IN_QUICK_TESTS else pytest.param(m, marks=pytest.mark.slow) for m in LINEAR]
)
def test_compiles_into_one_graph(method: str) -> None:
    torch._dynamo.reset()
    net, x, _ = make(method, "Linear")
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()


@pytest.mark.parametrize("method, layer", MERGING)
def test_unmerge_restores_every_bit(method: str, layer: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        net, _, _ = make(method, layer, dtype)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        for _ in range(3):
            net.merge_adapter()
            net.unmerge_adapter()
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), dtype


@pytest.mark.parametrize("method, layer", CASES)
def test_disabled_is_the_base_merged_or_not(method: str, layer: str) -> None:
    net, x, base = make(method, layer)
    with net.disable_adapter():
        assert torch.equal(net(x), base)
    if not EXAMPLES[method].merges_on(layer):
        return
    net.merge_adapter()
    merged = net(x)
    with net.disable_adapter():
        assert torch.equal(net(x), base)
    assert torch.equal(net(x), merged)


@pytest.mark.parametrize("method, layer", CASES)
def test_save_and_load(method: str, layer: str, tmp_path: Any) -> None:
    net, x, base = make(method, layer)
    net.save_pretrained(tmp_path)
    plain = copy.deepcopy(net).unload()
    assert torch.equal(plain(x), base)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(loaded(x), net(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("method, layer", CASES)
def test_gradients_reach_the_adapter_only(method: str, layer: str) -> None:
    net, x, _ = make(method, layer)
    net(x).square().sum().backward()
    own = {id(p) for adapter in adapter_set(net).adapters("default").values() for p in adapter.parameters()}
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name


@pytest.mark.parametrize("method, layer", CASES)
def test_delete_and_unload_give_the_plain_model_back(method: str, layer: str) -> None:
    net, x, base = make(method, layer)
    again = copy.deepcopy(net)
    net.delete_adapter("default")
    assert torch.equal(net(x), base) and net.active_adapters == []
    plain = again.unload()
    assert type(plain) is Net and not isinstance(plain, PeftModel)
    assert torch.equal(plain(x), base)


@pytest.mark.parametrize("method, layer", MERGING)
def test_merge_and_unload_keeps_the_function(method: str, layer: str) -> None:
    net, x, _ = make(method, layer)
    adapted, unloaded = net(x), copy.deepcopy(net).unload()
    plain = net.merge_and_unload(safe_merge=True)
    assert type(plain) is Net and plain.state_dict().keys() == unloaded.state_dict().keys()
    torch.testing.assert_close(plain(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method, layer", CASES)
def test_two_adapters_act_together_and_one_merges_alone(method: str, layer: str) -> None:
    net, x, base = make(method, layer)
    first = net(x)
    net.add_adapter("other", EXAMPLES[method].make(layer, target_modules=["target"], **EXAMPLES[method].second))
    net.set_requires_grad("default", False)
    net.set_requires_grad("other")
    randomise(net, EXAMPLES[method].spread, seed=3)
    for adapter in adapter_set(net).adapters("other").values():
        adapter.eval()  # PVeRA draws in training mode
    net.set_adapter("other")
    other = net(x)
    assert not torch.equal(first, other)
    net.set_adapter("default")
    assert torch.equal(net(x), first)
    net.set_adapter(["default", "other"])
    both = net(x)
    if not EXAMPLES[method].merges_on(layer):
        return
    net.merge_adapter(["default"])  # the other one goes on acting
    torch.testing.assert_close(net(x), both, rtol=1e-10, atol=1e-10)
    net.merge_adapter()
    torch.testing.assert_close(net(x), both, rtol=1e-10, atol=1e-10)
    net.unmerge_adapter()
    with net.disable_adapter():
        assert torch.equal(net(x), base)
    with pytest.raises(MergeError, match="unmerge"):
        net.merge_adapter()
        net.delete_adapter("other")


@pytest.mark.parametrize("method, layer", CASES)
def test_deepcopy_and_pickle(method: str, layer: str) -> None:
    net, x, _ = make(method, layer)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(twin, PeftModel) and torch.equal(twin(x), net(x))
        twin.set_adapter([])
        assert not torch.equal(twin(x), net(x))  # the copy has its own switch


@pytest.mark.parametrize("method", LINEAR)
def test_dtype_policy(method: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        net, x, _ = make(method, "Linear", dtype)
        assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)
        assert net(x).dtype == dtype
    net, x, _ = make(method, "Linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


class Watch(TorchDispatchMode):
    """Remembers the type and shape of every tensor that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, torch.Size]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.seen.append((tensor.dtype, tensor.shape))
        return out


@pytest.mark.parametrize("method", [method for method in LINEAR if method != "C3A"])  # no FFT has bfloat16
def test_weights_are_cast_to_the_activations_type_and_never_the_other_way(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.bases.compute_dtype._is_slow", lambda dtype: False)
    net, _, _ = make(method, "Linear", torch.bfloat16)
    x = torch.randn(50, 12, dtype=torch.bfloat16)  # no parameter is as large
    with Watch() as watch:
        net(x).sum().backward()
    assert not [shape for dtype, shape in watch.seen if dtype == torch.float32 and shape.numel() >= 50 * 8]


@pytest.mark.parametrize("method", [method for method in LINEAR if EXAMPLES[method].merges])
def test_safe_merge_changes_nothing_when_a_layer_is_not_finite(method: str) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    net = adapt(net, method, target_modules=["0", "1"])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    last = list(adapter_set(net).adapters("default").values())[-1]
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            for parameter in last.parameters():
                if parameter.requires_grad:
                    parameter.fill_(broken)
        with pytest.raises(MergeError, match="NaN or Inf"):
            net.merge_adapter(safe_merge=True)
        assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items() if "base_layer" in k), broken


# -- quantised bases: no method has code for them --------------------------------------------------------------------


NEED_DATA = ("gptq", "awq")
"""Storages that hold no merged weight, because only data can choose their codes. Their package is slow to import."""
QUANTISED = [
    pytest.param(storage, method, marks=pytest.mark.slow)
    if storage in NEED_DATA or (storage in STORAGES and method not in COMPILED_IN_QUICK_TESTS)
    else pytest.param(storage, method)
    for storage in ("nf4", "nf4+double", "fp4", "int8", "Q4_1", *STORAGES)
    for method in LINEAR
]
ROUND_INPUTS = {"int8": 0.05, "awq": 0.01}
"""Storages whose layer rounds an input in float32, and by how much; the others compute with it."""


@pytest.mark.parametrize("storage, method", QUANTISED)
def test_quantised_base(storage: str, method: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, x = Net(quantised(storage)), torch.randn(6, 64)
    base = net(x).detach()
    net = adapt(net, method)
    adapted = net(x)
    assert (adapted - base).abs().max() > 1e-3
    adapted.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)

    adapter = adapter_set(net).adapters("default")["target"]
    if EXAMPLES[method].merges:
        wanted = adapter.merged_weight(net.target.base.read().float())
        expected = nn.functional.linear(x, wanted, adapter.merged_bias(net.target.base_layer.bias.float()))
        close = ROUND_INPUTS.get(storage, 1e-4)
        assert (adapted - expected).abs().max() < close * expected.abs().max()

    net.eval()  # bitsandbytes repacks 4-bit weights for the CPU in eval mode: reading must survive it
    with torch.no_grad():
        base = net.target.base_layer(x)
        dense = net.target.base.read().clone()
        if EXAMPLES[method].merges and storage in NEED_DATA and adapter.changes_weight:
            with pytest.raises(MergeError, match=r"needs data.*dequantize_base"):
                net.merge_adapter()
        elif EXAMPLES[method].merges:
            wanted = adapter.merged_weight(dense)
            net.merge_adapter()
            # the widest gap between two 4-bit codes is a third of the block's largest weight; rounding loses half of it
            assert (net.target.base.read() - wanted).abs().max() < 0.2 * wanted.abs().max()
        net.unmerge_adapter()
        assert torch.equal(net.target.base.read(), dense)
        with net.disable_adapter():
            assert torch.equal(net(x), base)
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net.unload(), tmp_path)
    assert (loaded(x) - adapted).abs().max() < 0.05 * adapted.abs().max()

    dequantised = dequantize_base(loaded, torch.float32)(x)
    assert type(loaded.target.base_layer) is nn.Linear and not loaded.target.base.quantized
    assert (dequantised - adapted).abs().max() < 0.05 * adapted.abs().max()
    if EXAMPLES[method].merges:
        loaded.merge_adapter()
        assert (loaded(x) - dequantised).abs().max() < 1e-4 * adapted.abs().max()


# -- what may not pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR)
def test_a_failed_injection_or_load_leaves_the_model_untouched(method: str, tmp_path: Any) -> None:
    donor = get_peft_model(nn.Sequential(nn.Linear(12, 12)), EXAMPLES[method].make(target_modules=["0"]))
    donor.save_pretrained(tmp_path)
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
    modules = dict(net.named_modules())
    if EXAMPLES[method].sized:
        with pytest.raises(CheckpointError, match="another base"):
            PeftModel.from_pretrained(net, tmp_path)
    with pytest.raises(ValueError, match="ReLU"):
        inject_adapter_in_model(EXAMPLES[method].make(target_modules=["0", "1"]), net)
    assert dict(net.named_modules()) == modules and type(net) is nn.Sequential
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_config_round_trips_through_json(method: str, tmp_path: Any) -> None:
    config = EXAMPLES[method].make(target_modules=["b", "a"])
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
