"""What the papers of LoRA's variants say: DoRA, the starts, aLoRA; raw parameters, replicated blocks, ties."""

import copy
from typing import Any

import peft
import pytest
import torch
from method_example import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from peftcore import ConfigError, LoraConfig, MergeError, PeftModel, TargetError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora.variants.dora import row_lengths

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def adapter(net: Any, path: str = "0") -> Any:
    return adapter_set(net).adapters("default")[path]


def lora(net: nn.Module, **options: Any) -> Any:
    return get_peft_model(net, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"], **options}))


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(3, 6)),
    "conv1d of gpt2": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 6)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), lambda: torch.randn(2, 4, 6, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(0, 9, (3, 4))),
}


def net_and_input(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = LAYERS[layer]
    net, x = nn.Sequential(make()).double(), inputs()
    return net, x.double() if x.is_floating_point() else x


# -- DoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_dora_is_direction_times_magnitude(layer: str) -> None:
    net, x = net_and_input(layer)
    net = lora(net, use_dora=True)
    randomise(net, 0.3)
    a = adapter(net)
    v = a.base.read() + a.delta_weight()
    lengths = v.flatten(1).norm(dim=1)
    ones = (1,) * (v.dim() - 1)
    expected = v / lengths.view(-1, *ones) * a.magnitude.view(-1, *ones)
    torch.testing.assert_close(a.merged_weight(a.base.read()), expected, rtol=1e-10, atol=1e-10)
    adapted = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
def test_dora_starts_at_the_base_with_its_own_lengths(layer: str) -> None:
    net, x = net_and_input(layer)
    base = net(x)
    net = lora(net, use_dora=True)
    torch.testing.assert_close(net(x), base, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter(net).magnitude, adapter(net).base.read().flatten(1).norm(dim=1))


@pytest.mark.parametrize("start", [True, "pissa"])
def test_dora_with_dropout_drops_the_input_of_both_parts(start: Any) -> None:
    net, x = net_and_input("linear")
    net = lora(net, use_dora=True, lora_dropout=0.5, init_lora_weights=start)
    randomise(net, 0.3)
    a, layer = adapter(net), net[0].base_layer
    torch.manual_seed(5)
    got = net.train()(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    taken_out = 0 if a.start is None else a._product(*a.start)
    w = layer.weight - taken_out
    low_rank = a._product(a.lora_A, a.lora_B)
    ratio = a.magnitude / (w + low_rank).norm(dim=1)
    expected = x @ w.T + layer.bias + (ratio - 1) * (dropped @ w.T) + ratio * (dropped @ low_rank.T)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_length_gets_no_gradient() -> None:
    net, x = net_and_input("linear")
    net = lora(net, use_dora=True)
    randomise(net, 0.3)
    a, layer = adapter(net), net[0].base_layer
    net(x).square().sum().backward()
    got = a.lora_B.grad.clone()
    b = a.lora_B.detach().clone().requires_grad_()
    v = layer.weight + a.scaling * b @ a.lora_A
    y = x @ (v * (a.magnitude / v.norm(dim=1).detach())[:, None]).T + layer.bias
    y.square().sum().backward()
    torch.testing.assert_close(got, b.grad, rtol=1e-9, atol=1e-9)


def test_dora_never_builds_the_product_of_its_factors() -> None:
    """The lengths of the rows of W + sBA follow from small products; PEFT multiplies an identity matrix through."""
    net = lora(nn.Sequential(nn.Linear(40, 30)), use_dora=True)
    hf = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 30)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    products: dict[str, set[tuple[int, ...]]] = {}
    for name, model in (("ours", net), ("peft", hf)):
        with Products() as seen:
            model(torch.randn(3, 40))
        products[name] = seen.shapes
    assert {(30, 40), (40, 30)} & products["peft"] and not {(30, 40), (40, 30)} & products["ours"]


class Products(TorchDispatchMode):
    """Shapes of the matrix products computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.shapes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("layer", LAYERS)
def test_dora_beside_a_merged_adapter_has_the_lengths_of_the_unmerged_weight(layer: str) -> None:
    net, x = net_and_input(layer)
    net = lora(net, use_dora=True)
    net.set_requires_grad("default", False)
    net.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    randomise(net.eval(), 0.3)
    net.set_requires_grad("default", True)
    randomise(net, 0.3)
    a, weight = adapter(net), adapter(net).base.read().clone()
    lengths = (weight + a.delta_weight()).flatten(1).norm(dim=1)
    for active in (["b", "default"], ["default", "b"]):
        net.set_adapter(active)
        both = net(x)
        for merged in (["b"], ["default"], active):
            if merged == active[1:]:
                continue  # the first would then act on top of the second
            net.merge_adapter(merged)
            torch.testing.assert_close(net(x), both, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(row_lengths(a), lengths, rtol=1e-10, atol=1e-10)
            net.unmerge_adapter()


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_dora_parity_on_convolutions_and_embeddings(kind: str, tmp_path: Any) -> None:
    net, x = net_and_input(kind)
    net = net.float()
    x = x.float() if x.is_floating_point() else x
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], "use_dora": True}
    hf = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**options)).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path, save_embedding_layers=False)
    here = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(here(x), hf(x), rtol=1e-5, atol=1e-5)
    here.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours").eval()
    torch.testing.assert_close(there(x), hf(x), rtol=1e-5, atol=1e-5)


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_a_start_taken_out_of_the_base_changes_no_output_and_no_base(start: str, tmp_path: Any) -> None:
    net, x = net_and_input("linear")
    plain, base = copy.deepcopy(net), net(x)
    net = lora(net, init_lora_weights=start)
    torch.testing.assert_close(net(x), base, rtol=1e-6, atol=1e-6)
    assert torch.equal(net[0].base_layer.weight, plain[0].weight)  # type: ignore[index]
    assert adapter(net).lora_B.abs().max() > 0.1  # and yet the adapter holds the weight's main part
    net(x).square().sum().backward()
    assert adapter(net).lora_A.grad.abs().max() > 0
    randomise(net, 0.3)
    adapted = net(x)
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert loaded.peft_config["default"].r == 4 and loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(loaded(x), adapted, rtol=1e-6, atol=1e-6)
    again = lora(copy.deepcopy(plain), init_lora_weights=start)
    again.load_adapter_weights(tmp_path)  # as a resumed training does: the same factors, not a wider adapter
    assert torch.equal(adapter(again).lora_A, adapter(net).lora_A) and torch.equal(again(x), net(x))
    assert torch.equal(net.unload()(x), base)


def test_a_start_is_saved_with_the_same_scale_whatever_gives_it(tmp_path: Any) -> None:
    """Twice the rank: α is doubled, and under the root of rsLoRA only √2-fold; patterns follow."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    patterns: dict[str, Any] = {"rank_pattern": {"1": 3}, "alpha_pattern": {"1": 5}}
    for number, options in enumerate(({"use_rslora": True}, patterns, {"use_rslora": True, **patterns})):
        net = lora(copy.deepcopy(plain), target_modules=["0", "1"], init_lora_weights="pissa", **options)
        randomise(net, 0.3)
        net.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(number))
        there = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / str(number))).eval()
        for read in (loaded, there):
            torch.testing.assert_close(read(x), net(x), rtol=1e-5, atol=1e-5)


def test_pissa_holds_the_principal_part() -> None:
    net, _ = net_and_input("linear")
    weight = net[0].weight.detach()  # type: ignore[index]
    net = lora(net, init_lora_weights="pissa")
    u, s, vh = torch.linalg.svd(weight)
    a = adapter(net)
    torch.testing.assert_close(a.scaling * a.lora_B @ a.lora_A, u[:, :2] * s[:2] @ vh[:2], rtol=1e-5, atol=1e-6)


def test_olora_has_orthonormal_columns() -> None:
    net, _ = net_and_input("linear")
    net = lora(net, init_lora_weights="olora")
    b = adapter(net).lora_B
    torch.testing.assert_close(b.T @ b, torch.eye(2, dtype=b.dtype), rtol=1e-5, atol=1e-6)


def test_orthogonal_start_is_the_base_with_neither_factor_zero() -> None:
    net, x = net_and_input("linear")
    base = net(x)
    net = lora(net, init_lora_weights="orthogonal")
    torch.testing.assert_close(net(x), base, rtol=1e-6, atol=1e-6)
    assert min(adapter(net).lora_A.abs().max(), adapter(net).lora_B.abs().max()) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_nearer_to_the_weight_than_quantising_alone(bits: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64))
    weight, x = net[0].weight.detach().clone(), torch.randn(3, 64)
    base = net(x)
    net = lora(net, r=8, lora_alpha=8, init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 3})
    quantised = net[0].base_layer.weight.detach()
    assert not torch.equal(quantised, weight)
    error = (quantised + adapter(net).delta_weight() - weight).norm()
    assert error < 0.9 * (quantised - weight).norm()
    assert torch.equal(net.unload()(x), base)


def test_loftq_of_a_deleted_adapter_gives_the_weight_back() -> None:
    net, x = net_and_input("linear")
    base = net(x)
    net = lora(net, init_lora_weights="loftq")
    net.delete_adapter("default")
    assert torch.equal(net(x), base)


def test_a_rank_beyond_the_weight_is_refused_before_anything_changes() -> None:
    net, _ = net_and_input("linear")
    with pytest.raises(ConfigError, match="exceeds the weight's 5"):
        lora(net, r=6, init_lora_weights="pissa")
    assert type(net[0]) is nn.Linear  # type: ignore[index]


def test_other_adapters_see_the_true_base() -> None:
    net, x = net_and_input("linear")
    base = net(x)
    net = lora(net, init_lora_weights="pissa")
    net.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    net.set_adapter("plain")
    assert torch.equal(net(x), base)


def test_lora_bias_merges_with_its_scale() -> None:
    net, x = net_and_input("linear")
    net = lora(net, lora_bias=True)
    randomise(net, 0.3)
    adapted = net(x)
    a, layer = adapter(net), net[0].base_layer
    expected = x @ (layer.weight + a.delta_weight()).T + layer.bias + 3 * a.lora_bias
    torch.testing.assert_close(adapted, expected, rtol=1e-10, atol=1e-10)
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-10)


def test_lora_bias_without_a_bias_to_merge_into_is_refused() -> None:
    net = lora(nn.Sequential(nn.Linear(6, 5, bias=False)), lora_bias=True)
    with pytest.raises(MergeError, match="no bias"):
        net.merge_adapter()


# -- raw parameters ----------------------------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    ).eval()


TOKENS = torch.tensor([[1, 5, 7, 30, 2, 9]])
EXPERTS: dict[str, dict[str, Any]] = {
    "one parameter": {"target_parameters": ["experts.gate_up_proj"]},
    "two of one module and layers": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3},
    },
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_parity(case: str, tmp_path: Any) -> None:
    options = {"r": 2, "lora_alpha": 6, **EXPERTS[case]}
    options["target_modules"] = options.get("target_modules", [])
    hf = peft.get_peft_model(mixtral(), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path / "hf")
    expected = hf(TOKENS).logits
    here = PeftModel.from_pretrained(mixtral(), tmp_path / "hf")
    torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - mixtral()(TOKENS).logits).abs().max() > 1e-3
    here.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "ours").eval()
    torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_experts_merge_unmerge_switch_and_leave() -> None:
    model = mixtral()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = model(TOKENS).logits
    model = get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    assert len(adapter_set(model).layers) == 4
    torch.testing.assert_close(model(TOKENS).logits, base)
    randomise(model, 0.3)
    adapted = model(TOKENS).logits
    model(TOKENS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, adapted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    model.unmerge_adapter()
    assert torch.equal(model(TOKENS).logits, adapted)
    model.add_adapter("other", LoraConfig(r=3, target_parameters=["experts.down_proj"]))
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(TOKENS).logits, adapted)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, model(TOKENS).logits)
    plain = model.unload()
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def test_experts_what_does_not_fit() -> None:
    for names, message in ((["experts.gate_pu_proj"], "gate_up_proj"), (["q_proj.weight"], "target_modules")):
        with pytest.raises(TargetError, match=message):
            get_peft_model(mixtral(), LoraConfig(target_parameters=names))


def stacked(transposed: bool) -> nn.Module:
    """Experts kept as (e, i, o), with `is_transposed` as transformers marks it, or as (e, o, i)."""

    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn((3, 6, 4) if transposed else (3, 4, 6), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eio->beo" if self.is_transposed else "bi,eoi->beo", x, self.up)

    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts()})


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_either_orientation(transposed: bool, tmp_path: Any) -> None:
    """On disk A is (e·r, i) and B (o, r·e), expert by expert in A and rank by rank in B."""
    net = stacked(transposed)
    x, up = torch.randn(2, 6, dtype=torch.float64), net["experts"].up.detach().clone()
    net = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.up"], init_lora_weights=False))
    a = adapter(net, "experts.up")
    assert a.lora_A.shape == (6, 6) and a.lora_B.shape == (4, 6)
    delta = 3 * torch.einsum("ore,eri->eoi", a.lora_B.reshape(4, 2, 3), a.lora_A.reshape(3, 2, 6))
    expected = up + (delta.transpose(1, 2) if transposed else delta)
    adapted = net["experts"](x)
    torch.testing.assert_close(adapted, torch.einsum("bi,eio->beo" if transposed else "bi,eoi->beo", x, expected))
    net.save_pretrained(tmp_path)
    net.merge_adapter()
    torch.testing.assert_close(net["experts"].up, expected)
    net.unmerge_adapter()
    plain = net.unload()
    assert torch.equal(plain["experts"].up, up)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)["experts"](x), adapted)


# -- aLoRA -------------------------------------------------------------------------------------------------------------


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "eos_token_id": None, "pad_token_id": 0, **options})
    ).eval()


def alora() -> Any:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8])
    model = get_peft_model(llama(), config)
    randomise(model, 0.5)
    return model


INVOKED = torch.tensor([[3, 7, 8, 5, 7, 8, 4], [3, 4, 5, 6, 7, 9, 8]])


def test_alora_acts_from_the_last_invocation_on() -> None:
    model, base = alora(), llama()(INVOKED).logits
    logits = model(INVOKED).logits
    assert torch.equal(logits[0, :4], base[0, :4])  # the first invocation is not the last
    assert not torch.allclose(logits[0, 4:], base[0, 4:])
    torch.testing.assert_close(logits[1], base[1])  # no invocation: the base
    with pytest.raises(MergeError, match="some positions"):
        model.merge_adapter()


def test_alora_parity(tmp_path: Any) -> None:
    model = alora()
    model.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert isinstance(hf, peft.PeftModelForCausalLM) or hf.peft_config["default"].task_type is None
    offsets = [3, None]
    theirs = hf(input_ids=INVOKED, alora_offsets=offsets).logits
    torch.testing.assert_close(model(INVOKED).logits, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(INVOKED, alora_offsets=offsets).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_alora_generates_what_repeated_forwards_give(beams: int) -> None:
    model, prompt = alora(), INVOKED
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    uncached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    if beams == 1:
        assert torch.equal(cached[0], uncached[0])
    base = llama().generate(prompt[1:], attention_mask=torch.ones_like(prompt[1:]), **options)
    assert torch.equal(cached[1], base[0])
    given = model.generate(prompt, attention_mask=torch.ones_like(prompt), alora_offsets=[3, None], **options)
    assert torch.equal(given, cached)


# -- replicated blocks, tokens, ties -----------------------------------------------------------------------------------


def test_layer_replication_parity_and_undoing(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "layer_replication": [[0, 2], [1, 2]],
    }
    hf = peft.get_peft_model(llama(), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path / "hf")
    expected = hf(TOKENS, use_cache=False).logits
    plain = llama()
    base = plain(TOKENS).logits
    here = PeftModel.from_pretrained(plain, tmp_path / "hf")
    assert len(here.model.layers) == 3 and here.config.num_hidden_layers == 3
    torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert here.model.layers[1].mlp.gate_proj.weight is here.model.layers[2].mlp.gate_proj.weight
    generated = here.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, here.generate(TOKENS, max_new_tokens=4, do_sample=False, use_cache=False))
    plain = here.unload()
    assert len(plain.model.layers) == 2 and torch.equal(plain(TOKENS).logits, base)


def test_layer_replication_undone_by_delete_and_by_failure() -> None:
    model = llama()
    with pytest.raises(TargetError):
        get_peft_model(model, LoraConfig(target_modules=["nothing"], layer_replication=[(0, 2), (0, 2)]))
    assert len(model.model.layers) == 2
    with pytest.raises(ConfigError, match="no range"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 3)]))
    base = model(TOKENS).logits
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]))
    model.delete_adapter("default")
    assert torch.equal(model(TOKENS).logits, base)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[1, 5, 39], {"embed_tokens": [1, 5]}])
def test_lora_with_trainable_tokens_parity(tied: bool, tokens: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    hf = peft.get_peft_model(llama(tie_word_embeddings=tied), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path / "hf")
    expected = hf(TOKENS).logits
    here = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "hf")
    torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    here.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    merged = here.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_pair_is_adapted_alike(tmp_path: Any) -> None:
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options))
    randomise(model, 0.3)
    layers = adapter_set(model).adapters("default")
    assert set(layers) == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(layers["lm_head"].delta_weight(), layers["model.embed_tokens"].delta_weight().T)
    assert sum(p.requires_grad for p in model.parameters()) == 2  # one pair of factors trains
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    there = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path).eval()
    torch.testing.assert_close(there(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_tied_pair_trained_whole_stays_one_weight() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(ensure_weight_tying=True, **options))
    copies = adapter_set(model).copies("default")
    assert copies["lm_head"].weight is copies["model.embed_tokens"].weight
    assert copies["lm_head"].weight is not model.lm_head.base_layer.weight


def test_a_tied_pair_trained_whole_is_saved_as_two_tensors(tmp_path: Any) -> None:
    """safetensors refuses memory that is shared, and views that are not whole: what is saved is cloned first."""
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(ensure_weight_tying=True, **options))
    randomise(model, 0.3)
    layer = adapter(model, "model.layers.0.self_attn.q_proj")
    layer.lora_A.data = layer.lora_A.detach().T.contiguous().T
    assert not layer.lora_A.is_contiguous()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_dora_compiles_into_one_graph_and_follows_its_base_there() -> None:
    net, x = net_and_input("linear")
    model = lora(net, use_dora=True)
    randomise(model, 0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model[0].base_layer.weight.mul_(3)
    torch.testing.assert_close(compiled(x), model(x))


def test_raw_parameters_beside_layers_that_may_be_tied() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0]

    net = nn.Sequential(nn.Linear(6, 6), Experts())
    model = lora(net, target_parameters=["1.up"], ensure_weight_tying=True)
    assert set(adapter_set(model).adapters("default")) == {"0", "1.up"}
