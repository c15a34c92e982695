"""Which layers a configuration means."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_example import randomise
from tiny_models import tiny
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import IA3Config, LoraConfig, PeftModel, TargetError, TaskType, get_peft_model
from peftcore.config import TunerConfig
from peftcore.injection import preparation, targets
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import MANY_TARGETS, NO_TARGETS, find_targets, shortest_names, without_excluded


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.overhead = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"head": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def targets_of(**options: Any) -> list[str]:
    return sorted(find_targets(Heads(), LoraConfig(**options)))


def test_names_match_whole_segments() -> None:
    assert targets_of(target_modules=["head"]) == ["block.head", "head"]
    assert targets_of(target_modules=["block.head"]) == ["block.head"]
    assert targets_of(target_modules=r".*head") == ["block.head", "head", "overhead"]
    assert targets_of(target_modules="all-linear", exclude_modules=["head"]) == ["overhead"]


def test_a_parametrised_weight_is_adapted_by_its_layer() -> None:
    model = Heads()
    nn.utils.parametrizations.weight_norm(model.head)
    x = torch.randn(2, 4)
    expected = model.head(x)
    nn.utils.parametrizations.weight_norm(model.block["head"])
    with pytest.raises(
        TargetError, match=r"computed by a parametrisation of head, .* name the layer in target_modules"
    ):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["head.weight"]))
    adapted: Any = get_peft_model(model, LoraConfig(target_modules="head", r=2))
    assert torch.equal(adapted.head(x), expected)
    torch.nn.init.ones_(adapted.head.lora_B["default"].weight)
    assert not torch.allclose(adapted.head(x), expected)


def test_of_modules_and_parameters_one_may_match_nothing() -> None:
    both: dict[str, Any] = {"target_modules": ["overhead"], "target_parameters": ["block.norm.weights"]}
    with pytest.warns(RuntimeWarning, match="'block.norm.weights' is no parameter.*only target_modules have an effect"):
        model = get_peft_model(Heads(), LoraConfig(**both))
    assert sorted(adapter_set(model).layers) == ["overhead"]
    both["target_parameters"] = ["head.weight", "block.norm.weights"]
    with pytest.raises(TargetError, match=r"'block\.norm\.weights' is no parameter"):
        get_peft_model(Heads(), LoraConfig(**both))
    with pytest.warns(RuntimeWarning), pytest.raises(TargetError, match=r"neither target_modules=.*foot.* nor"):
        get_peft_model(Heads(), LoraConfig(target_modules=["foot"], target_parameters=["block.norm.weights"]))


def test_a_parameter_of_the_model_itself_is_refused_as_in_peft() -> None:
    def heads() -> Heads:
        model = Heads()
        model.scale = nn.Parameter(torch.ones(4, 4))
        model.block.scale = nn.Parameter(torch.ones(4, 4))
        return model

    own: dict[str, Any] = {"target_parameters": ["scale"], "r": 2}
    for target_modules in ([], ["overhead"]):
        with pytest.raises(ValueError, match="top-level module is not supported"):
            peft.get_peft_model(heads(), peft.LoraConfig(target_modules=target_modules, **own))
        with pytest.raises(TargetError, match="'scale' is a parameter of the model itself"):
            get_peft_model(heads(), LoraConfig(target_modules=target_modules, **own))
    config = LoraConfig(target_modules=[], target_parameters=["block.scale"], r=2)
    assert sorted(adapter_set(get_peft_model(heads(), config)).layers) == ["block.scale"]


def test_modules_to_save_match_whole_segments() -> None:
    model = get_peft_model(Heads(), LoraConfig(target_modules=["overhead"], modules_to_save=["head"]))
    trained = {
        n.split(".modules_to_save.")[0]
        for n, p in model.named_parameters()
        if p.requires_grad and ".modules_to_save." in n
    }
    assert trained == {"head", "block.head"}
    model = get_peft_model(Heads(), LoraConfig(target_modules=["overhead"], modules_to_save=["block.head"]))
    assert isinstance(model.head, nn.Linear) and type(model.head) is nn.Linear


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["haed"]}, "match no layer.*did you mean 'head'"),
        ({"target_modules": ["norm"]}, "LORA does not adapt norm layers such as block.norm"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, r"exclude_modules=\['head'\] excludes all"),
        ({"target_modules": r".*head", "layers_to_transform": [7]}, r"layers_to_transform=\[7\] excludes all"),
        ({"target_modules": ["head"], "modules_to_save": ["tail"]}, "modules_to_save"),
    ],
)
def test_what_cannot_be_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        get_peft_model(Heads(), LoraConfig(**options))


def test_a_sequence_classifier_keeps_its_head_out_of_all_linear() -> None:
    config = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = BertForSequenceClassification(config)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"}


def test_attention_that_reads_weights_directly_is_refused() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TargetError, match="never calls the layer"):
        get_peft_model(net, LoraConfig(target_modules=["out_proj"]))


def test_all_linear_leaves_such_attention_out() -> None:
    model = get_peft_model(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)), LoraConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"linear1", "linear2"}


def test_a_subclass_of_linear_with_another_output_is_refused() -> None:
    with pytest.raises(TargetError, match=r"feed_forward\.router is a Llama4Router, which cannot be adapted"):
        get_peft_model(tiny("llama4_text"), LoraConfig(target_modules=["router"]))
    adapted = get_peft_model(tiny("llama4_text"), LoraConfig(target_modules="all-linear"))
    assert "router" not in adapted.peft_config["default"].target_modules


@pytest.mark.parametrize("model_type, name", [("phimoe", "router"), ("deepseek_v4", "o_a_proj")])
def test_its_weight_is_adapted_where_names_of_routers_are(model_type: str, name: str) -> None:
    torch.manual_seed(0)
    base, text = tiny(model_type, "cpu").eval(), torch.arange(10, 18)[None]
    model = get_peft_model(base, LoraConfig(target_modules=[name])).eval()
    randomise(model, 0.3)
    with torch.no_grad():
        expected = model(text).logits
        torch.testing.assert_close(model.merge_and_unload()(text).logits, expected)


def test_one_module_at_two_paths_is_adapted_at_both() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["a"]))
    assert net["a"] is net["b"][0]
    assert net.unload()["b"][0] is shared


@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.filterwarnings("ignore:tied weights of the model differ after the merge:UserWarning")
def test_tied_head_merges_without_changing_the_embedding() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config).eval(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    x = torch.randint(0, 30, (1, 5))
    adapted = model(x).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, adapted)
    assert merged.config.tie_word_embeddings is False


def test_the_saved_configuration_names_its_targets() -> None:
    """Readers such as vLLM know no architecture table."""
    config = LoraConfig(target_modules="all-linear", exclude_modules=["overhead"])
    model = get_peft_model(Heads(), config)
    assert model.peft_config["default"].target_modules == {"head", "overhead"}
    assert config.target_modules == "all-linear"


class Unknown(nn.Module):
    """Neither attention nor a feed-forward layer, and nothing that says which layer is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.middle = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 3)


@pytest.mark.parametrize("config", [LoraConfig(), IA3Config()], ids=["lora", "ia3"])
def test_no_default_reaches_into_a_model_of_unknown_structure(config: Any) -> None:
    model = Unknown()
    modules = dict(model.named_modules())
    with pytest.raises(TargetError, match=r"cannot be told from its head; give target_modules.*'head', 'stem'"):
        get_peft_model(model, config)
    assert dict(model.named_modules()) == modules


def test_whoever_says_all_linear_gets_all() -> None:
    model = get_peft_model(Unknown(), LoraConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"stem", "0", "1", "head"}


def test_loading_a_directory_resolves_its_targets_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_peft_model(Heads(), LoraConfig(target_modules=["head"])).save_pretrained(tmp_path)
    resolved: list[TunerConfig] = []
    original = targets.target_paths

    def counted(module_index: ModuleIndex, config: TunerConfig) -> list[str]:
        resolved.append(config)
        return original(module_index, config)

    for module in (targets, preparation):
        monkeypatch.setattr(module, "target_paths", counted)
    model = PeftModel.from_pretrained(Heads(), tmp_path)
    assert len(resolved) == 1 and model.peft_config["default"].target_modules == {"head"}


def test_an_exclusion_that_matches_nothing_warns() -> None:
    with pytest.warns(UserWarning, match="exclude_modules .* has no effect"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], exclude_modules=["7"]))


@pytest.mark.parametrize(
    ("wanted", "others", "names"),
    [
        (["a.b.c"], [], {"c"}),
        (["1.q", "2.q"], ["3.q"], {"1.q", "2.q"}),
        (["a.b.c", "d.e.f"], ["d.x.f", "a.b"], {"c", "e.f"}),
        (["net.proj", "net.time_proj"], ["time"], {"proj", "time_proj"}),
        (["a.q"], ["b.a.q"], {"a.q"}),
        (["a.q"], ["a.q"], {"q"}),
    ],
)
def test_the_shortest_names_match_the_wanted_paths_only(wanted: list[str], others: list[str], names: set[str]) -> None:
    assert shortest_names(wanted, others) == names


def blocks(count: int) -> nn.Module:
    layers = [nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}) for _ in range(count)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.ModuleDict({"k": nn.Linear(2, 2)})})


def test_a_long_list_of_paths_becomes_short_names_of_the_same_layers() -> None:
    every = [f"layers.{number}.{name}" for number in range(MANY_TARGETS) for name in "qk"]
    model = get_peft_model(blocks(MANY_TARGETS), LoraConfig(target_modules=every))
    names = model.peft_config["default"].target_modules
    assert "q" in names and "k" not in names and len(names) == 1 + MANY_TARGETS
    assert sorted(model.targeted_module_names) == sorted(every)
    short = [f"layers.{number}.q" for number in range(MANY_TARGETS - 1)]
    model = get_peft_model(blocks(MANY_TARGETS - 1), LoraConfig(target_modules=short))
    assert set(model.peft_config["default"].target_modules) == set(short)


def test_feedforward_modules_of_a_long_list_stay_among_its_names(tmp_path: Path) -> None:
    paths = [f"layers.{number}.q" for number in range(MANY_TARGETS)]
    config = IA3Config(target_modules=paths, feedforward_modules=paths[:1])
    get_peft_model(blocks(MANY_TARGETS), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(blocks(MANY_TARGETS), tmp_path)
    assert [loaded.layers[number].q.is_feedforward for number in (0, 1)] == [True, False]


def test_excluded_paths_and_other_blocks_are_left_out() -> None:
    config = LoraConfig(target_modules=["q"], exclude_modules=["head.q"], layers_to_transform=[1])
    assert without_excluded(["layers.0.q", "layers.1.q", "head.q"], config) == ["layers.1.q"]


def test_a_whole_path_among_the_names_is_adapted_outside_of_the_chosen_blocks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["head.k", "layers.0.q", "k"], "layers_to_transform": [1]}
    named: Any = blocks(2)
    theirs = peft.get_peft_model(nn.ModuleDict({"inner": named}), peft.LoraConfig(**options))
    assert theirs.targeted_module_names == ["inner.layers.1.k"], "these names are no whole paths"
    theirs = peft.get_peft_model(blocks(2), peft.LoraConfig(**options, layers_pattern="layers"))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(blocks(2), tmp_path)
    assert ours.targeted_module_names == theirs.targeted_module_names == ["layers.0.q", "layers.1.k", "head.k"]


@pytest.mark.parametrize("method", ["Lora", "IA3", "VBLoRA", "Poly"])
def test_an_adapter_without_layers_does_nothing_as_in_peft(method: str, tmp_path: Path) -> None:
    """A program adds such an adapter and fills it later by others, or trains only `modules_to_save` with it."""
    options = {"VBLoRA": {"num_vectors": 8, "vector_length": 2}, "IA3": {"feedforward_modules": []}}.get(method, {})
    config = getattr(peftcore, f"{method}Config")(target_modules=NO_TARGETS, **options)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = plain(x)
    model = get_peft_model(plain, config)
    assert torch.equal(model(x), expected) and model.targeted_module_names == []
    model.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.equal(model(x), expected)
    model.set_adapter("default")
    assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.merge_and_unload()(x), expected)


def test_modules_train_whole_beside_an_adapter_without_layers() -> None:
    for library in (peft, peftcore):
        plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = library.LoraConfig(target_modules=NO_TARGETS, modules_to_save=["1"])
        model = library.get_peft_model(plain, config)
        trained = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"1.modules_to_save.default.weight", "1.modules_to_save.default.bias"}
