"""Which adapters act and train; the cost of switching."""

import contextlib
import copy
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from routed_models import TOKENS, llama, mixture
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import (
    AdapterNameError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcore.conversion import add_as_lora
from peftcore.errors import MergeError, RoutingError
from peftcore.injection.activation import set_adapter
from peftcore.injection.adapter_set import adapter_set
from peftcore.routing import AdapterStore


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


def net() -> Any:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0"))


def test_adding_never_changes_another_adapter() -> None:
    model = net()
    model.set_requires_grad("default", False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("b", lora("0", "1"))
    now = {n.replace("1.base_layer", "1"): p.requires_grad for n, p in model.named_parameters() if ".b." not in n}
    assert now == before
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".b." in n), "until it is active"


@pytest.mark.parametrize("name", ["o", "0", "base_layer", "weight", "lora_A", "default2"])
def test_loading_or_freezing_one_by_any_name_never_changes_another(name: str, tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0", "1")).save_pretrained(tmp_path)
    model = net()

    def is_own(parameter: str) -> bool:
        return "lora_" in parameter and parameter.split(".")[2] == name

    def trained() -> dict[str, bool]:
        of_others = ((n, p) for n, p in model.named_parameters() if not is_own(n))
        return {n.replace("1.base_layer", "1"): p.requires_grad for n, p in of_others}

    before = trained()
    for is_trainable in (False, True):
        model.load_adapter(tmp_path, name, is_trainable=is_trainable)
        own = [p.requires_grad for n, p in model.named_parameters() if is_own(n)]
        assert trained() == before and own == [is_trainable] * 4  # as in PEFT
        for requires_grad in (True, False):
            model.set_requires_grad(name, requires_grad)
            assert trained() == before
        model.delete_adapter(name)
    assert trained() == before


@pytest.mark.parametrize("layers, adapters", [(2, 2), (60, 20)])
def test_switching_for_inference_touches_no_module(layers: int, adapters: int) -> None:
    """Constant cost: no attribute of any module is read or written, whatever their number."""
    model = get_peft_model(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))), lora(*map(str, range(layers))))
    for i in range(adapters):
        model.add_adapter(f"a{i}", lora("0"))
    model.set_requires_grad([*model.peft_config], False)
    touched: list[str] = []

    def watch(self: nn.Module, name: str) -> Any:
        touched.append(name)
        return object.__getattribute__(self, name)

    classes = {type(m) for m in model.modules() if m is not model}
    try:
        for cls in classes:
            cls.__getattribute__ = watch  # type: ignore[method-assign]
        model.set_adapter("a0", inference_mode=True)
    finally:
        for cls in classes:
            if "__getattribute__" in cls.__dict__:
                del cls.__getattribute__
    assert model.active_adapters == ["a0"] and touched == []


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def test_a_store_leaves_a_plain_model_the_base(tmp_path: Path) -> None:
    model, x = plain(), torch.randn(2, 6)
    base = model(x)
    net().save_pretrained(tmp_path / "a")
    store = AdapterStore(model)
    store.register("a", tmp_path / "a")
    with store.route("a"):
        assert not torch.allclose(model(x), base)
    assert torch.equal(model(x), base) and adapter_set(model).selection.active == ()
    store.close()
    assert torch.equal(model(x), base)


def test_who_activates_an_adapter_is_who_does_in_peft(tmp_path: Path) -> None:
    """`get_peft_model`, `inject_adapter_in_model` and `from_pretrained` do; adding, loading and combining do not."""
    first = net()
    first.save_pretrained(tmp_path)
    for active in (["default"], []):
        model = net()
        model.set_adapter(active)
        model.add_adapter("b", lora("0"))
        model.load_adapter(tmp_path, "c")
        model.add_weighted_adapter(["b", "c"], [1.0, 1.0], "d")
        add_as_lora(model, "b", "e")
        store = AdapterStore(model)
        store.register("f", tmp_path)
        store.acquire("f").release()
        assert model.active_adapters == active
    assert get_peft_model(model, lora("1"), "g").active_adapters == ["g"]
    assert inject_adapter_in_model(lora("1"), model, "h").active_adapters == ["h"]
    assert PeftModel.from_pretrained(model, tmp_path, "i").active_adapters == ["i"]


def test_another_adapter_is_active_after_the_active_one_is_deleted() -> None:
    model = net()
    for name in ("b", "c"):
        model.add_adapter(name, lora("0"))
    with pytest.warns(UserWarning, match=r"\['default'\] are deleted; 'b' is the active one now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    model.set_adapter(["b", "c"])
    model.delete_adapter("b")
    assert model.active_adapters == ["c"]
    model.delete_adapter("c")
    assert model.active_adapters == []
    model.add_adapter("d", lora("0"))
    assert model.active_adapters == []
    model.add_adapter("e", lora("0"))
    model.delete_adapter("e")
    assert model.active_adapters == [], "nothing was active before"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("prompts", "expected"), [(False, "a"), (True, "b")])
def test_it_is_the_adapter_that_hf_peft_activates(prompts: bool, expected: str) -> None:
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    for library in (peft, peftcore):
        if prompts:
            config = library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
        else:
            config = library.LoraConfig(r=1, target_modules=["q_proj"])
        model: Any = library.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8)), config, "z")
        for name in ("b", "a"):
            model.add_adapter(name, copy.deepcopy(config))
        model.delete_adapter("z")
        assert model.active_adapters == [expected]


def test_a_store_that_evicts_activates_nothing(tmp_path: Path) -> None:
    net().save_pretrained(tmp_path)
    model = plain()
    store = AdapterStore(model)
    for name in ("a", "b"):
        store.register(name, tmp_path)
    names = [store.acquire(name) for name in ("a", "b")]
    set_adapter(model, names[0].name)
    names[0].release()
    store.close()
    assert adapter_set(model).selection.active == () and list(adapter_set(model).configs) == [names[1].name]


@pytest.mark.parametrize("again", [get_peft_model, lambda m, c: inject_adapter_in_model(c, m)], ids=["model", "layers"])
def test_a_second_adapter_of_one_name_takes_the_firsts_place(again: Any) -> None:
    model = net()
    model.add_adapter("other", lora("0"))
    old = adapter_set(model).adapters("default")["0"]
    with pytest.raises(TargetError, match="match no layer"):
        again(model, lora("nothing"))
    with pytest.raises(ConfigError, match="to a plain model"):
        again(model, lora("0", layer_replication=[[0, 1]]))
    assert adapter_set(model).adapters("default")["0"] is old
    with pytest.warns(UserWarning, match="'default' was loaded already and is replaced by an untrained one"):
        assert again(model, LoraConfig(r=3, target_modules=["1"])) is model
    assert set(model.peft_config) == {"default", "other"} and model.active_adapters == ["default"]
    assert list(adapter_set(model).adapters("default")) == ["1"]
    assert torch.equal(model(torch.ones(1, 6)), plain()(torch.ones(1, 6)))


def test_names_that_are_not_there() -> None:
    model = net()
    for call in (model.set_adapter, model.delete_adapter, model.set_requires_grad):
        with pytest.raises(AdapterNameError, match="Adapter x does not exist; loaded: default"):
            call("x")
    with pytest.raises(AdapterNameError, match="at most once"):
        model.set_adapter(["default", "default"])
    with pytest.raises(AdapterNameError, match="already an adapter named 'default'"):
        model.add_adapter("default", lora("0"))
    assert model.active_adapters == ["default"] == model.active_adapters()


def test_disable_is_restored_after_an_exception() -> None:
    model, x = net(), torch.randn(2, 6)
    before = model(x)
    with pytest.raises(RuntimeError), model.disable_adapter():
        raise RuntimeError
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("inside", [False, True])
def test_threads_that_disable_adapters_overlap(inside: bool) -> None:
    """Each disables them for itself: the other one computes with them, and nothing stays disabled."""
    model, x = net(), torch.randn(2, 6)
    adapted = model(x)
    with model.disable_adapter():
        base = model(x)
    entered, left, failures = threading.Event(), threading.Event(), []

    def first() -> None:
        with model.route("default") if inside else contextlib.nullcontext(), model.disable_adapter():
            entered.set()
            left.wait(10)
            failures.extend([] if torch.equal(model(x), base) else ["first"])

    def second() -> None:
        entered.wait(10)
        failures.extend([] if torch.equal(model(x), adapted) else ["second, outside"])
        with model.disable_adapter():
            failures.extend([] if torch.equal(model(x), base) else ["second, inside"])
            left.set()
            threads[0].join()
        failures.extend([] if torch.equal(model(x), adapted) else ["second, afterwards"])

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and torch.equal(model(x), adapted)


def test_threads_that_disable_merged_adapters() -> None:
    """There is one set of weights: the last one to leave puts the merged ones back, and other calls are refused."""
    model, x = net(), torch.randn(2, 6)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    merged, state = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def in_a_thread(work: Any) -> Any:
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(work())
            except RoutingError as error:
                found.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    def disabled() -> Any:
        with model.disable_adapter():
            return model(x)

    first, second = model.disable_adapter(), model.disable_adapter()
    with first:
        assert torch.equal(model(x), base) and torch.equal(in_a_thread(disabled), base)
        assert "another thread is inside of disable_adapter()" in in_a_thread(lambda: model(x))
        with second:
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), merged) and torch.equal(in_a_thread(lambda: model(x)), merged)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with model[1].register_forward_hook(lambda *_: refused.append(in_a_thread(disabled))):
        refused: list[Any] = []
        assert torch.equal(model(x), merged)
    assert "another thread is calling the model" in refused[0]


def test_replicas_of_data_parallel_follow_the_thread_that_made_them() -> None:
    """DataParallel calls each in a thread of its own, which sees no route of its caller's."""
    model, x = net(), torch.randn(2, 6)
    model.add_adapter("b", lora("0"))

    def by_replica() -> torch.Tensor:
        replica = model._replicate_for_data_parallel()  # what nn.DataParallel calls for each module
        replica.__dict__["_modules"] = model._modules
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(replica(x)))
        thread.start()
        thread.join()
        return found[0]

    assert torch.equal(by_replica(), model(x))
    with model.disable_adapter():
        base = model(x)
        assert torch.equal(by_replica(), base)
    with model.route("b"):
        assert torch.equal(by_replica(), model(x)) and not torch.equal(model(x), base)


def test_modules_to_save_has_one_acting_copy_and_the_original_without() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0", modules_to_save=["1"]))
    model.add_adapter("b", lora("0"))
    x = torch.randn(2, 6)
    original = model[1].base_layer.weight
    with torch.no_grad():
        model[1].copies["default"].weight.add_(1.0)
    assert not torch.equal(model[1].weight, original), "the acting copy's weight is what model code reads"
    model.set_adapter("b")
    assert torch.equal(model[1].weight, original)
    model.set_adapter("default")
    adapted = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own import of itself
def test_attaching_after_compile_is_refused() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6)))
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        get_peft_model(compiled, lora("0"))


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_is_merged_while_adapters_are_disabled(merged: bool) -> None:
    model, x = net(), torch.randn(2, 6)
    model.add_adapter("other", lora("0"))
    if merged:
        model.merge_adapter()
    before = model(x)
    with model.disable_adapter():
        base = model(x)
        with pytest.raises(MergeError, match="inside of disable_adapter"):
            model.merge_adapter(["other"])
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), before)


def test_nothing_switches_adapters_on_inside_of_disable_adapter() -> None:
    """Inside, the model is its base, as the context promises; naming an adapter is an error."""
    model = mixture(llama())
    base = model(TOKENS, adapter_names="__base__").logits
    said = r"\['b'\] cannot be used inside of disable_adapter\(\), where the model is its base; leave that context"
    with model.disable_adapter():
        for call in (model, model.forward, model.generate):
            with pytest.raises(RoutingError, match=said):
                call(TOKENS, adapter_names="b")
        with pytest.raises(RoutingError, match=said), model.route(["b", None]):
            pass
        with model.route([None] * 6), pytest.raises(RoutingError, match=said), model.route("b"):
            pass
        assert torch.equal(model(TOKENS, adapter_names=[None] * 6).logits, base)
        model.set_adapter("b")  # for the time after
        assert torch.equal(model(TOKENS).logits, base)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base)
        assert torch.equal(model(TOKENS).logits, base)
    assert torch.equal(model(TOKENS).logits, model(TOKENS, adapter_names="b").logits)


def test_of_several_adapters_all_or_none_are_deleted() -> None:
    model = net()
    model.add_adapter("b", lora("1"))
    model.merge_adapter(["b"])
    with pytest.raises(MergeError, match=r"\['b'\] are merged"):
        model.delete_adapter(["default", "b"])
    assert list(model.peft_config) == ["default", "b"]
    with pytest.warns(UserWarning, match="'b' is the active one now"):
        model.delete_adapter("default")  # another adapter may be merged
    assert list(model.peft_config) == ["b"]


def test_only_one_copy_of_a_module_can_be_active() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lora("0", modules_to_save=["1"]))
    model.add_adapter("b", lora("0", modules_to_save=["1"]))
    model.add_adapter("c", lora("0"))
    with pytest.raises(AdapterNameError, match=r"\['default', 'b'\] each train 1 in full"):
        model.set_adapter(["default", "b"])
    model.set_adapter(["c", "b"])
    assert model[1].active_adapters == ["b"]
