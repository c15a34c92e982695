"""What cannot be is refused by a typed error that says what was given and what fits; the model is then as it was."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import examples
from prompt_models import build
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import (
    AdapterNameError,
    AdapterStore,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftConfig,
    PeftError,
    PeftModel,
    TargetError,
    TrainingError,
    errors,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftcore.methods.ia3 import IA3Config
from peftcore.prompts.prefix_tuning import PrefixTuningConfig
from peftcore.prompts.prompt_tuning import PromptTuningConfig
from peftcore.registry import methods

EXAMPLES = {method: example for method, example in examples().items() if not example.whole_model}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def snapshot(model: Any) -> dict[str, Any]:
    """All that an error must leave: the very modules and parameters, their classes, what trains, hooks, attributes."""
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        "classes": {path: type(module) for path, module in modules},
        "modules": {path: id(module) for path, module in modules},
        "parameters": {path: id(p) for path, p in model.named_parameters(remove_duplicate=False)},
        "requires_grad": {path: p.requires_grad for path, p in model.named_parameters(remove_duplicate=False)},
        "training": {path: module.training for path, module in modules},
        "hooks": {path: [len(getattr(module, name)) for name in HOOKS] for path, module in modules},
        "attributes": {path: set(vars(module)) for path, module in modules},
        "active": list(model.active_adapters) if isinstance(model, PeftModel) else [],
        "configurations": dict(model.peft_config) if isinstance(model, PeftModel) else {},
        "depth": getattr(getattr(model, "config", None), "num_hidden_layers", None),
    }


@contextlib.contextmanager
def refused(model: Any, error: type[PeftError], *said: str) -> Iterator[None]:
    """The block raises `error`, its message has every word of `said`, and the model is what it was, bit for bit."""
    before, bits = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error) as raised:
        yield
    for words in said:
        assert words in str(raised.value)
    after = snapshot(model)
    for what, state in before.items():
        assert after[what] == state, what
    now = model.state_dict()
    assert now.keys() == bits.keys() and all(torch.equal(value, bits[key]) for key, value in now.items())


def config_of(method: str) -> Any:
    """The configuration class of a method."""
    return methods()[method].config


def net() -> nn.Module:
    """Layers 12 x 12 and 12 x 10: what must divide both sizes of a layer may fit the first and not the second."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10))


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(targets) or ["0"], **options})


# -- fields that are not the method's ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods())
def test_another_methods_field_is_refused_by_name(method: str) -> None:
    config = config_of(method)
    foreign = "boft_block_num" if method != "BOFT" else "lora_alpha"
    with pytest.raises(ConfigError, match=f"{config.__name__}: unknown option '{foreign}'; (did you mean|known: )"):
        config(**{foreign: 3})
    with pytest.raises(ConfigError, match=f"unknown option '{foreign}'"):
        PeftConfig.from_dict({"peft_type": method, foreign: 3})


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout", "use_dora"])
def test_ia3_has_no_field_of_lora(field: str) -> None:
    with pytest.raises(ConfigError, match=f"IA3Config: unknown option '{field}'"):
        config_of("IA3")(**{field: 1})


@pytest.mark.parametrize("method", EXAMPLES)
def test_a_misspelt_field_gets_a_suggestion(method: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'target_modules'"):
        EXAMPLES[method].make(target_module=["0"])


@pytest.mark.parametrize("method", EXAMPLES)
def test_an_unknown_key_on_disk_is_kept_and_warned_of(method: str, tmp_path: Path) -> None:
    EXAMPLES[method].make(target_modules=["0"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 3}))
    with pytest.warns(UserWarning, match="unknown to this version: 'from_the_future'; kept"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert json.loads(config.to_json())["from_the_future"] == 3 and "from_the_future" not in config.to_dict()


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("[1, 2]", CheckpointError, "holds a list, not the fields"),
        ('"LORA"', CheckpointError, "holds a str, not the fields"),
        ("{}", ConfigError, "without peft_type"),
        ('{"peft_type": ["LORA"]}', ConfigError, "not a name: ['LORA']; try 'LORA'"),
        (
            '{"peft_type": "LORRA"}',
            ConfigError,
            "unknown adapter method 'LORRA', which no installed package defines; did you mean 'LORA'",
        ),
        ('{"peft_type": "LORA", "r": "8"}', ConfigError, "r must be an integer; got '8'"),
        ('{"peft_type": "LORA", "r": 0}', ConfigError, "r must be a positive integer; got 0"),
        ('{"peft_type": "LORA", "arrow_config": {"top_k": 0}}', ConfigError, "top_k must be at least 1; got 0"),
        ('{"peft_type": "LORA", "megatron_config": {"a": 2}}', ConfigError, "would change the results"),
    ],
)
def test_a_configuration_file_that_cannot_be(text: str, error: type[PeftError], message: str, tmp_path: Path) -> None:
    get_peft_model(net(), lora()).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "SHA256SUMS").unlink()
    model = net()
    with refused(model, error, message):
        PeftModel.from_pretrained(model, tmp_path)


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"r": "8"}, "r must be an integer; got '8'"),
    ({"r": True}, "r must be an integer; got True"),
    ({"lora_alpha": None}, "lora_alpha must be a number; got None"),
    ({"use_dora": "yes"}, "use_dora must be True or False; got 'yes'"),
    ({"target_modules": 3}, "target_modules must be a list of strings or a string or None; got 3"),
    ({"target_modules": {"0": 1}}, "target_modules must be a list"),
    ({"target_modules": [3]}, "target_modules must be a list of strings or a string or None; got [3]"),
    ({"target_modules": "("}, "target_modules '(' is not a regular expression"),
    ({"exclude_modules": "["}, "exclude_modules '[' is not a regular expression"),
    ({"layers_to_transform": 0, "layers_pattern": "["}, "layers_pattern '[' is not a regular expression"),
    ({"modules_to_save": "head"}, "modules_to_save must be a list of strings or None; got 'head'"),
    ({"rank_pattern": [("0", 2)]}, "rank_pattern must be a dictionary or None"),
    ({"rank_pattern": {"[": 2}}, "rank_pattern '[' is not a regular expression"),
    ({"rank_pattern": {"0": 0}}, "rank_pattern['0'] must be a positive integer; got 0"),
    ({"rank_pattern": {"0": 1.5}}, "rank_pattern['0'] must be a positive integer; got 1.5"),
    ({"alpha_pattern": {"0": "a"}}, "alpha_pattern['0'] must be a number; got 'a'"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bit": 4}}, "did you mean 'loftq_bits'"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "must be a positive integer; got 0"),
]


@pytest.mark.parametrize("options, message", WRONG_TYPES, ids=lambda value: str(value)[:40])
def test_a_value_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        lora(**options)
    assert message in str(raised.value)


# -- ranks and blocks ----------------------------------------------------------------------------------------------

POSITIVE = "must be a positive integer; got 0; try"
IMPOSSIBLE: dict[str, list[tuple[dict[str, Any], str]]] = {
    "ADALORA": [
        ({"init_r": 0, "target_r": 0}, POSITIVE),
        (
            {"rank_pattern": {"2.lora_E": [True, False]}},
            "rank_pattern at 2 must have one entry for each of the 4 triplets",
        ),
        ({"rank_pattern": {"2.lora_E": 2}}, "rank_pattern['2.lora_E'] must be a list; got 2"),
    ],
    "BOFT": [
        ({"boft_block_size": 0, "boft_block_num": 0}, "either boft_block_size or boft_block_num"),
        ({"boft_block_size": 5}, "5 must divide the 12 features of 0; try 4"),
        ({"boft_block_size": 0, "boft_block_num": 7}, "7 must divide the 12 features of 0"),
        ({"boft_block_size": 2, "boft_n_butterfly_factor": 3}, "a multiple of 4 of them; 0 has 6 blocks of 2"),
    ],
    "ADAMSS": [
        ({"r": 0}, POSITIVE),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "init_warmup must be below final_warmup=9; got 9"),
    ],
    "C3A": [
        ({"block_size": 0}, POSITIVE),
        ({"block_size": 4}, "block_size at 2 must divide 12 inputs and 10 outputs; got 4; try 2"),
    ],
    "DEFT": [({"r": 0}, POSITIVE), ({"deft_dropout": 1.0}, "below 1; got 1.0")],
    "DELORA": [({"r": 0}, POSITIVE), ({"rank_pattern": {"2": 0}}, "rank_pattern['2'] must be a positive integer")],
    "FOURIERFT": [
        ({"n_frequency": 0}, POSITIVE),
        ({"n_frequency": 144}, "n_frequency at 2 must be between 1 and the 120 weights; got 144"),
    ],
    "FROD": [({"sparse_rate": 1.5}, "sparse_rate must be from 0 to 1; got 1.5")],
    "GLORA": [({"r": 0}, POSITIVE)],
    "GRALORA": [
        ({"r": 0}, POSITIVE),
        ({"r": 5, "gralora_k": 2}, "r must be a multiple of gralora_k=2, got 5; try 6"),
        ({"r": 8, "gralora_k": 4}, "gralora_k must divide 12 and 10 at 2, got 4; try 2"),
    ],
    "HIRA": [({"r": 0}, POSITIVE), ({"rank_pattern": {"2": -1}}, "must be a positive integer; got -1")],
    "TINYLORA": [({"r": 0}, POSITIVE), ({"u": 0}, POSITIVE)],
    "HRA": [
        ({"r": 0}, POSITIVE),
        ({"r": 13, "apply_GS": True}, "r up to the 12 features of 0, got 13; try 12"),
    ],
    "LILY": [
        ({"r": 0}, POSITIVE),
        ({"num_B": 1}, "num_B must be at least 2, for the router to choose; got 1"),
    ],
    "LOHA": [({"r": 0}, POSITIVE), ({"rank_pattern": {"2": 0}}, "must be a positive integer; got 0")],
    "LOKR": [
        ({"r": 0}, POSITIVE),
        ({"rank_pattern": {"2": 0}}, "must be a positive integer; got 0"),
        ({"decompose_factor": 0}, "decompose_factor must be a positive integer; got 0"),
    ],
    "BOTTLENECK": [
        ({"bottleneck_size": 0}, "bottleneck_size must be a positive integer; got 0"),
        ({"bottleneck_size": None, "reduction_factor": 0.5}, "reduction_factor must be at least 1; got 0.5"),
    ],
    "LORA": [
        ({"r": 0}, POSITIVE),
        ({"rank_pattern": {"2": 0}}, "must be a positive integer; got 0"),
        ({"r": 11, "init_lora_weights": "pissa"}, "r=11 exceeds the weight's 10 singular vectors; take a smaller r"),
        ({"r": 11, "init_lora_weights": "olora"}, "r=11 exceeds the weight's 10 singular vectors; take a smaller r"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "needs even ranks; got [3]"),
    ],
    "MISS": [
        ({"r": 0}, POSITIVE),
        ({"r": 13}, "r must be at most the 12 inputs of 0, got 13"),
        ({"r": 4, "init_weights": "bat"}, "r must divide 12 and 10, got 4; try 2"),
        ({"r": 2, "init_weights": "mini", "mini_r": 4}, "mini_r must divide the 10 outputs of 2, got 4"),
    ],
    "OFT": [
        ({"r": 0, "oft_block_size": 0}, "got r=0, oft_block_size=0"),
        ({"r": 3, "oft_block_size": 4}, "got r=3, oft_block_size=4"),
        ({"r": 12, "oft_block_size": 0}, "blocks of size 1 rotate nothing at 0, which has 12 features"),
        ({"r": -2, "oft_block_size": 0}, "r must be a positive integer; got -2"),
    ],
    "PEANUT": [({"r": 0}, POSITIVE), ({"depth": -1}, "depth must be 0 or a positive integer; got -1")],
    "OSF": [
        ({"effective_rank": 0}, "effective_rank must be a positive number; got 0; try 8, or 0.5 for half"),
        ({"rank_pattern": {"2": -0.5}}, "2 must be a positive number; got -0.5"),
        ({"effective_rank": 0.05}, "effective_rank keeps none of the 12 singular directions of 0; give a larger one"),
    ],
    "POLY": [({"r": 0}, POSITIVE), ({"n_splits": 4}, "n_splits must divide 12 and 10 at 2, got 4; try 2")],
    "PSOFT": [({"r": 0}, POSITIVE), ({"r": 11}, "r must be at most the 10 singular values of 2, got 11; try 10")],
    "PVERA": [({"r": 0}, POSITIVE)],
    "RANDLORA": [({"r": 0}, POSITIVE)],
    "ROAD": [
        ({"group_size": 0}, POSITIVE),
        ({"group_size": 3}, "group_size must be even, got 3; try 4"),
        ({"group_size": 4}, "group_size must divide the 10 outputs of 2, got 4"),
    ],
    "SHIRA": [({"r": 0}, POSITIVE), ({"r": 6}, "r=6 at 2 asks for 132 entries of a weight of 120; r fits up to 5")],
    "SUPERTUNING": [
        ({"r": 0}, POSITIVE),
        ({"sparsity": 0.995}, "sparsity=0.995 leaves no trainable entries of the 144 at 0; give at most 0.993"),
    ],
    "UNILORA": [
        ({"r": 0}, POSITIVE),
        ({"theta_d_length": 0}, "theta_d_length must be a positive integer; got 0"),
    ],
    "VBLORA": [
        ({"r": 0}, POSITIVE),
        ({"vector_length": 4}, "2 has out_features=10, got vector_length=4"),
        ({"num_vectors": 1, "topk": 2}, "topk must not exceed num_vectors=1; got 2"),
    ],
    "VERA": [({"r": 0}, POSITIVE)],
    "WAVEFT": [
        ({"n_frequency": 0}, POSITIVE),
        ({"n_frequency": 144}, "n_frequency at 2 must be between 1 and 120 weights; got 144"),
    ],
}
WITHOUT_A_SIZE = {"BEFT", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"}


def test_every_method_with_a_size_is_asked() -> None:
    assert set(IMPOSSIBLE) | WITHOUT_A_SIZE == set(EXAMPLES)


@pytest.mark.parametrize(
    "method, options, message",
    [
        pytest.param(method, options, message, id=f"{method}-{'-'.join(map(str, options))}-{number}")
        for method, cases in IMPOSSIBLE.items()
        for number, (options, message) in enumerate(cases)
    ],
)
def test_impossible_ranks_and_blocks(method: str, options: dict[str, Any], message: str) -> None:
    for model in (net(), get_peft_model(net(), lora("0", "2"))):  # alone, and beside another adapter
        with refused(model, ConfigError, message):
            get_peft_model(model, EXAMPLES[method].make(**{"target_modules": ["0", "2"], **options}), "new")


@pytest.mark.parametrize("number", [0, -1, None, 1.5])
@pytest.mark.parametrize("method", ["MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_impossible_prompts(method: str, number: Any) -> None:
    model = build("llama")
    with refused(model, ConfigError, "num_virtual_tokens must be", f"got {number!r}"):
        get_peft_model(model, config_of(method)(num_virtual_tokens=number))


# -- layers --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "conv": lambda: nn.Conv1d(12, 8, 3),
    "embedding": lambda: nn.Embedding(20, 8),
    "norm": lambda: nn.LayerNorm(12),
}
NAMES = {"linear": "Linear", "conv": "Conv1d", "embedding": "Embedding", "norm": "LayerNorm"}
"""The contract test's layers, whose options fit these."""
UNKNOWN: dict[str, Any] = {
    "ReLU": nn.ReLU,
    "LSTM": lambda: nn.LSTM(4, 4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(9, 4),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4)),
}


def with_one_that_fits(method: str, other: nn.Module) -> tuple[nn.Module, PeftConfig]:
    """A model whose layer 0 fits the method and whose layer 1 is `other`, and a configuration that means both."""
    fitting = next(kind for kind in LAYERS if kind in methods()[method].adapter.layer_kinds)
    config = EXAMPLES[method].make(NAMES[fitting], target_modules=["0", "1"])
    if isinstance(config, IA3Config):
        config.feedforward_modules = set()
    return nn.Sequential(LAYERS[fitting](), other), config


@pytest.mark.parametrize("method", EXAMPLES)
def test_a_kind_of_layer_that_the_method_does_not_adapt(method: str) -> None:
    kinds = methods()[method].adapter.layer_kinds
    for kind in LAYERS.keys() - kinds:
        model, config = with_one_that_fits(method, LAYERS[kind]())
        message = f"{method} does not adapt {kind} layers such as 1; it adapts {', '.join(sorted(kinds))}"
        with refused(model, TargetError, message):
            get_peft_model(model, config)


@pytest.mark.parametrize("method", EXAMPLES)
def test_a_layer_that_nothing_adapts(method: str) -> None:
    for layer, make in UNKNOWN.items():
        model, config = with_one_that_fits(method, make())
        with refused(model, TargetError, f"1 is a {layer}, which cannot be adapted; adapters support Linear, "):
            get_peft_model(model, config)


@pytest.mark.parametrize("method", EXAMPLES)
def test_targets_that_are_not_there(method: str) -> None:
    model = net()
    with refused(model, TargetError, "['q_proj'] match no layer of this model; known: 0, 2"):
        get_peft_model(model, EXAMPLES[method].make(target_modules=["q_proj"]))


def test_a_misspelt_all_linear() -> None:
    model = net()
    with refused(model, TargetError, "'all_linear' match no layer of this model; did you mean 'all-linear'?"):
        get_peft_model(model, LoraConfig(target_modules="all_linear"))


def test_an_adapter_goes_into_a_model() -> None:
    with pytest.raises(TypeError, match="needs the base model first, then the configuration; got 'gpt2'"):
        get_peft_model("gpt2", LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs the configuration first, then the model; got LoraConfig"):
        inject_adapter_in_model(net(), lora())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AdapterStore needs the base model first; got 'gpt2'"):
        AdapterStore("gpt2")  # type: ignore[arg-type]


def test_tensors_are_a_mapping() -> None:
    with pytest.raises(TypeError, match=r"such as get_peft_model_state_dict\(model\) returns; got None"):
        set_peft_model_state_dict(get_peft_model(net(), lora()), None)  # type: ignore[arg-type]


def test_a_misspelt_option_gets_a_suggestion(tmp_path: Path) -> None:
    get_peft_model(net(), lora()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no option 'trainable'; did you mean 'is_trainable'"):
        PeftModel.from_pretrained(net(), tmp_path, trainable=True)
    with pytest.raises(TypeError) as error:
        LoraConfig(nonsense=1)
    assert "'extra'" not in str(error.value)


# -- adapters that exclude each other ------------------------------------------------------------------------------


def test_a_taken_or_impossible_name() -> None:
    model = get_peft_model(net(), lora())
    with refused(model, AdapterNameError, "already an adapter named 'default'; delete it first"):
        model.add_adapter("default", lora("2"))
    for name in ("a.b", "a/b", "", 3, None):
        with refused(model, AdapterNameError, "a string, which must not be empty or contain '.' or '/'", repr(name)):
            model.add_adapter(name, lora("2"))
    with refused(model, AdapterNameError, "set_adapter takes an adapter's name or a list of names; got 1"):
        model.set_adapter(1)


def test_two_that_make_the_model_deeper() -> None:
    deeper: dict[str, Any] = {"layer_replication": [(0, 2), (0, 2)]}
    for first in ({}, deeper):
        model = get_peft_model(build("llama"), lora("q_proj", **first))
        with refused(model, ConfigError, "layer_replication", "add that adapter first, to a plain model"):
            model.add_adapter("b", lora("q_proj", **deeper))
    model.add_adapter("b", lora("q_proj"))
    with refused(model, ConfigError, "'default' made the model deeper", "delete the others first"):
        model.delete_adapter("default")


@pytest.mark.parametrize("ranges", [[(0, 3)], [(1, 1)], [(-1, 1)], [(2, 0)]])
def test_blocks_that_are_not_there(ranges: list[tuple[int, int]]) -> None:
    model = build("llama")
    with refused(model, ConfigError, "is not a range of the model's 2 blocks"):
        get_peft_model(model, lora("q_proj", layer_replication=ranges))


def test_a_deeper_model_is_undone_by_a_later_error() -> None:
    model = build("llama")
    with refused(model, TargetError, "match no layer"):
        get_peft_model(model, lora("nothing", layer_replication=[(0, 2), (0, 2)]))
    with refused(model, ConfigError, "exceeds"):
        get_peft_model(model, lora("q_proj", r=64, init_lora_weights="pissa", layer_replication=[(0, 2), (0, 2)]))


def test_two_prompts_before_one_text() -> None:
    model = get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=3))
    model.add_adapter("two", PrefixTuningConfig(num_virtual_tokens=3))
    with refused(model, AdapterNameError, "['default', 'two'] are prompts", "only one prompt can be active"):
        model.set_adapter(["default", "two"])


def test_a_module_that_is_adapted_and_trained_whole() -> None:
    model = get_peft_model(net(), lora("0", modules_to_save=["2"]))
    with refused(model, TargetError, "2 is already trained in full", "exclude it"):
        model.add_adapter("b", lora("2"))
    with refused(model, TargetError, "['0'] already have an adapter", "not both"):
        model.add_adapter("b", lora("2", modules_to_save=["0"]))


def test_tokens_of_an_embedding_that_is_a_target_itself() -> None:
    model = build("llama")
    with refused(model, ConfigError, "model.embed_tokens is a target itself", "leave it out of one"):
        get_peft_model(model, lora("embed_tokens", trainable_token_indices=[1]))


# -- prompts and gradient checkpointing ----------------------------------------------------------------------------


def test_a_prefix_and_checkpointing_exclude_each_other_both_ways() -> None:
    model = build("llama")
    model.activation_checkpointing_enable()
    with refused(model, ConfigError, "needs a cache", "activation_checkpointing_disable", "PromptTuningConfig"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3))
    model.activation_checkpointing_disable()
    model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3)).train()
    model.activation_checkpointing_enable()
    with refused(model, TrainingError, "activation_checkpointing_disable", "PromptTuningConfig"):
        model(torch.tensor([[1, 2, 3]]))


def test_a_prefix_is_not_loaded_onto_a_checkpointing_model(tmp_path: Path) -> None:
    get_peft_model(build("llama"), PrefixTuningConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    model = build("llama")
    model.activation_checkpointing_enable()
    with refused(model, ConfigError, "activation_checkpointing_disable"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("method", ["MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_a_model_that_cannot_have_a_prompt(method: str) -> None:
    model = net()
    with refused(model, ConfigError, "Sequential"):
        get_peft_model(model, config_of(method)(num_virtual_tokens=3))


# -- directories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in EXAMPLES if "linear" in methods()[m].adapter.layer_kinds])
def test_a_directory_of_another_base(method: str, tmp_path: Path) -> None:
    if not EXAMPLES[method].sized:
        pytest.skip("nothing in its directory depends on the layer's size")
    donor = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(12, 8))
    get_peft_model(donor, EXAMPLES[method].make(target_modules=["0", "2"])).save_pretrained(tmp_path)
    plain = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(24, 16))  # its first layer fits
    with refused(plain, CheckpointError, "another base"):
        PeftModel.from_pretrained(plain, tmp_path)
    model = get_peft_model(plain, lora("0", "2"))
    with refused(model, CheckpointError, "another base"):
        model.load_adapter(tmp_path, "b")
    with refused(shorter := nn.Sequential(nn.Linear(12, 8)), CheckpointError, "does not fit", "unexpected"):
        PeftModel.from_pretrained(shorter, tmp_path)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["2"]}, {"init_lora_weights": "loftq"}])
def test_a_directory_of_another_base_with_more_than_adapters(options: dict[str, Any], tmp_path: Path) -> None:
    get_peft_model(net(), lora("0", **options)).save_pretrained(tmp_path)
    model = nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 10))
    with refused(model, CheckpointError, "another base"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("method", ["P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_a_prompt_of_another_base(method: str, tmp_path: Path) -> None:
    get_peft_model(build("gpt2"), config_of(method)(num_virtual_tokens=3)).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor[:, :-1].contiguous() for key, tensor in load_file(weights).items()}, weights)
    (tmp_path / "SHA256SUMS").unlink()
    model = build("gpt2")
    with refused(model, errors.SizeMismatchError, "belongs to another base model", "size mismatch"):
        PeftModel.from_pretrained(model, tmp_path)


# -- merging -------------------------------------------------------------------------------------------------------


def test_a_merge_that_cannot_be_leaves_every_layer() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 3, groups=2)), lora("0", "1"))
    for call in (model.merge_adapter, model.merge_and_unload):
        with refused(
            model,
            MergeError,
            "1: adapter 'default' cannot be merged: LORA on a convolution",
            "keep the adapter unmerged",
        ):
            call()
    for names in (["nope"], "nope"):
        with refused(model, AdapterNameError, "Adapter nope does not exist; loaded: default"):
            model.merge_adapter(names)


def test_a_merged_adapter_is_not_deleted() -> None:
    model = get_peft_model(net(), lora("0"))
    model.merge_adapter()
    with refused(model, MergeError, "['default'] are merged", "unmerge_adapter first"):
        model.delete_adapter("default")


def test_every_error_is_of_one_tree() -> None:
    kinds = [kind for name, kind in vars(errors).items() if name.endswith("Error")]
    assert kinds and all(issubclass(kind, PeftError) for kind in kinds)


def test_a_dictionary_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match="got dict"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), {"r": 4})  # type: ignore[arg-type]
