"""One seed gives the same adapter here and in HF `peft`, the oracle: start values, generator, dropout and losses."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_layers import quantised
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods
from peftcore.storage.adapter_state import adapter_state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.lin = nn.Linear(12, 8)
        self.lin2 = nn.Linear(8, 12, bias=False)
        self.gpt = Conv1D(8, 12)
        self.conv1 = nn.Conv1d(12, 8, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.conv3 = nn.Conv3d(4, 8, 2)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4)
        self.experts = Experts()


class Experts(nn.Module):
    """Raw weights of two experts, and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 12, 8))
        self.down = nn.Parameter(torch.randn(6, 10))


LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 40,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "nf4": lambda: nn.Sequential(quantised("nf4"), quantised("nf4")),
    "nf4 in bf16": lambda: nn.Sequential(computes_in_bf16(quantised("nf4")), quantised("nf4")),
    "int8": lambda: nn.Sequential(quantised("int8"), quantised("int8")),
}


def computes_in_bf16(layer: Any) -> Any:
    layer.compute_dtype = torch.bfloat16
    return layer


def build(model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    made = MODELS[model]()
    return made if isinstance(made, nn.Sequential) else made.to(dtype)


def tensors_of(model: Any, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter under the keys on disk."""
    if isinstance(model, peft.PeftModel):
        return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return adapter_state_of(adapter_set(model), name).tensors()


def assert_same(ours: Any, theirs: Any, name: str = "default", except_for: str = "") -> None:
    here, there = tensors_of(ours, name), tensors_of(theirs, name)
    assert here
    for key, tensor in here.items():
        if except_for and except_for in key:
            continue
        expected = there[key]
        if tensor.shape != expected.shape:  # here with the start that is subtracted, stacked behind
            tensor = tensor[tuple(slice(size) for size in expected.shape)]
        if tensor.dtype == torch.float64:  # PEFT's constants, such as 0.1, are float32's
            torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=0)
        else:
            assert torch.equal(tensor, expected.to(tensor.dtype)), key
    repeated = adapter_state_of(adapter_set(ours), name).repeated()
    assert there.keys() <= here.keys() | repeated


def both(
    model: str, config: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, training: bool = True
) -> tuple[Any, Any]:
    """The adapted model of each library, from one seed; the generators must then be at the same place."""
    pair = []
    for library in (peftcore, peft):
        base, made = build(model, dtype).train(training), getattr(library, config)(**copy.deepcopy(options))
        torch.manual_seed(0)
        pair.append((library.get_peft_model(base, made), torch.rand(1)))
    (ours, here), (theirs, there) = pair
    assert here == there, "the generators are at different places"
    return ours, theirs


LINEAR = {"target_modules": ["lin", "lin2"]}
TABLE: dict[str, list[dict[str, Any]]] = {
    "AdaLoraConfig": [
        {"init_r": 3, "target_r": 2, "total_step": 10, **more}
        for more in (LINEAR, {**LINEAR, "init_lora_weights": False}, {"target_modules": ["gpt"]})
    ],
    "AdamssConfig": [
        {"r": 4, "num_subspaces": 3, "subspace_rank": 2, "init_weights": init, **more, **LINEAR}
        for init in ("orthogonal", None)
        for more in ({}, {"use_dynamic_rank": True, "svd_threshold": 0.5})
    ],
    "BeftConfig": [{"init_weights": init, **LINEAR} for init in (True, False)],
    "BOFTConfig": [
        {"boft_block_size": 2, "target_modules": targets, "init_weights": init}
        for targets in (["lin", "lin2"], ["conv2"])
        for init in (True, False)
    ],
    "C3AConfig": [
        {"block_size": 4, "init_weights": init, **LINEAR}
        for init in (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")
    ],
    "DeftConfig": [
        {"r": 3, "init_weights": init, **more, **LINEAR}
        for init in (True, False)
        for more in ({}, {"decomposition_method": "qr", "alpha": 6})
    ]
    + [{"r": 3, "para": True, **LINEAR}],
    "DeloraConfig": [{"r": 2, "init_weights": init, **LINEAR} for init in (True, False)],
    "FourierFTConfig": [
        {"n_frequency": 10, "init_weights": init, "target_modules": targets}
        for init in (True, False)
        for targets in (["lin", "lin2"], ["gpt"])
    ],
    "FrodConfig": [
        {"sparse_rate": rate, "init_weights": init, "progressbar": False, "target_modules": targets}
        for rate, init in ((0.1, True), (0.1, False), (0.0, True))
        for targets in (["lin", "lin2"], ["gpt"])
    ],
    "GloraConfig": [
        {"r": 3, "init_weights": init, **more, **LINEAR}
        for init in (True, False)
        for more in (
            {},
            {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
            {"config_A_B": "constant", "config_C": "none"},
            {"config_A_B": "none", "config_D_E": "none"},
        )
    ],
    "GraloraConfig": [
        {"r": 4, "gralora_k": 2, "hybrid_r": hybrid, "init_weights": init, **LINEAR}
        for hybrid in (0, 2)
        for init in (True, False)
    ],
    "HiraConfig": [
        {"r": 3, "init_weights": init, "target_modules": [target]}
        for init in (True, False, "gaussian")
        for target in ("lin", "gpt", "emb", "conv1", "conv2", "conv3")
    ],
    "HRAConfig": [
        {"r": r, "init_weights": init, "target_modules": targets}
        for r, init in ((4, True), (3, True), (4, False))
        for targets in (["lin", "lin2"], ["conv2"])
    ],
    "IA3Config": [
        {"init_ia3_weights": init, "target_modules": targets, "feedforward_modules": forward}
        for init in (True, False)
        for targets, forward in ((["lin", "lin2"], ["lin2"]), (["gpt"], []), (["conv2"], []), (["conv3"], ["conv3"]))
    ],
    "LilyConfig": [
        {"r": 3, "init_weights": init, "target_modules": targets, "stride_A": stride}
        for init in (True, False)
        for targets, stride in ((["lin", "lin2"], 1), ("lin|head", 2))
    ],
    "LNTuningConfig": [{"target_modules": ["norm"]}],
    "LoHaConfig": [
        {"r": 2, "init_weights": init, **more}
        for init in (True, False)
        for more in (
            {"target_modules": ["lin", "lin2", "conv1", "conv2", "grouped"]},
            {"target_modules": ["conv1", "conv2"], "use_effective_conv2d": True},
            {**LINEAR, "rank_pattern": {"lin2": 3}},
        )
    ],
    "LoKrConfig": [
        {"r": r, "init_weights": init, **more}
        for r in (1, 8)
        for init in (True, False, "lycoris")
        for more in (
            {"target_modules": ["lin", "lin2", "conv1", "conv2", "grouped"]},
            {"target_modules": ["conv1", "conv2"], "use_effective_conv2d": True},
            {**LINEAR, "decompose_both": True, "decompose_factor": 4},
        )
    ],
    "LoraConfig": [
        *(
            {"r": 4, "init_lora_weights": init, "target_modules": [target]}
            for init in (True, False, "gaussian")
            for target in ("lin", "gpt", "emb", "conv1", "conv2", "conv3", "grouped")
        ),
        *(
            {"r": 2, "init_lora_weights": init, **LINEAR}
            for init in ("orthogonal", "pissa", "pissa_niter_4", "olora", "eva")
        ),
        *({"r": 4, "use_dora": True, "target_modules": [target]} for target in ("lin", "gpt", "emb", "conv1", "conv2")),
        *({"r": 4, "kasa_config": {"beta": 0.1}, "init_lora_weights": init, **LINEAR} for init in (True, False)),
        *(
            {"r": 4, "use_bdlora": {f"target_modules_bd_{side}": ["lin"], "nblocks": 4}, **LINEAR}
            for side in ("a", "b")
        ),
        *(
            {"r": 4, "velora_config": {"num_groups": 5, "init_type": init}, **LINEAR}
            for init in ("random", "batch_average")
        ),
        {"r": 4, "monteclora_config": {"num_samples": 2, "buffer_size": 2}, **LINEAR},
        *({"r": 4, "init_lora_weights": "mica", "target_modules": [target]} for target in ("lin", "gpt", "emb")),
        {"r": 4, "lora_bias": True, "target_modules": ["lin", "conv2"]},
        {"r": 4, "lora_bias": True, "target_modules": ["lin", "grouped"], "init_lora_weights": False},
        {"r": 4, "use_rslora": True, "lora_dropout": 0.1, "target_modules": r".*(lin|conv).*"},
        {"r": 4, "rank_pattern": {"lin2": 2, "^conv1": 8}, "target_modules": ["lin", "lin2", "conv1", "emb"]},
        {"r": 4, "modules_to_save": ["head", "norm"], "bias": "all", **LINEAR},
        {"r": 4, "trainable_token_indices": {"emb": [1, 3]}, **LINEAR},
        {"r": 4, "target_modules": ["lin"], "target_parameters": ["experts.up", "experts.down"]},
        {"r": 4, "exclude_modules": ["lin"], "target_modules": ["lin", "lin2", "emb", "head"]},
    ],
    "MissConfig": [
        *({"r": 4, "init_weights": init, **LINEAR} for init in (True, False, "bat")),
        {"r": 4, "init_weights": "mini", "mini_r": 2, **LINEAR},
    ],
    "OFTConfig": [
        {"oft_block_size": 2, "init_weights": init, "target_modules": [target]}
        for init in (True, False)
        for target in ("lin", "emb", "conv2")
    ],
    "PeanutConfig": [
        {"r": 3, "depth": depth, "init_weights": init, **LINEAR} for depth in (0, 2) for init in (True, False)
    ],
    "OSFConfig": [
        *({"effective_rank": rank, **LINEAR} for rank in (None, 3, 0.25)),
        {"rank_pattern": {"n2": 2}, "init_weights": False, **LINEAR},
    ],
    "PolyConfig": [
        {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "init_weights": init, **LINEAR} for init in (True, False)
    ],
    "PsoftConfig": [
        {"r": 3, "init_weights": init, "psoft_orth": orth, **LINEAR}
        for init, orth in ((True, True), (False, True), (False, False))
    ],
    "PveraConfig": [
        {"r": 3, "init_weights": init, "target_modules": targets}
        for init in (True, False)
        for targets in (["lin", "lin2"], ["gpt"])
    ],
    "RandLoraConfig": [
        {"r": 3, "init_weights": init, "target_modules": targets, **more}
        for init, more in ((True, {}), (False, {}), (True, {"sparse": True}))
        for targets in (["lin", "lin2"], ["gpt"])
    ],
    "RoadConfig": [
        {"variant": variant, "group_size": 4, "init_weights": init, **LINEAR}
        for variant in ("road_1", "road_2", "road_4")
        for init in (True, False)
    ],
    "ShiraConfig": [
        {"r": 2, "random_seed": seed, "init_weights": i, **LINEAR} for seed in (None, 3) for i in (True, False)
    ],
    "SupertuningConfig": [
        {"sparsity": 0.8, "r": r, "select_top": top, "init_weights": init, **LINEAR}
        for r, top, init in ((None, True, True), (None, False, False), (2, True, True), (2, False, False))
    ],
    "TinyLoraConfig": [
        {"u": 5, "init_weights": init, "weight_tying": tying, "target_modules": targets}
        for init, tying in ((True, 0.0), ("uniform", 0.0), ("uniform", 0.5))
        for targets in (["lin", "lin2"], ["gpt", "emb"])
    ],
    "TrainableTokensConfig": [
        {"token_indices": [1, 3], "init_weights": init, "target_modules": ["emb"]} for init in (True, False)
    ],
    "UniLoraConfig": [
        {"r": 2, "theta_d_length": 32, "init_weights": init, "target_modules": targets}
        for init in (True, False)
        for targets in (["lin", "lin2"], ["gpt"])
    ],
    "VBLoRAConfig": [{"r": 2, "num_vectors": 8, "vector_length": 4, **LINEAR}],
    "VeraConfig": [
        {"r": 3, "init_weights": init, "target_modules": targets}
        for init in (True, False)
        for targets in (["lin", "lin2"], ["gpt"])
    ],
    "WaveFTConfig": [
        {"n_frequency": 10, "init_weights": init, "target_modules": targets}
        for init in (True, False)
        for targets in (["lin", "lin2"], ["gpt"])
    ],
}
CASES = [(config, number) for config, cases in TABLE.items() for number in range(len(cases))]
TOKENS = {"num_virtual_tokens": 3}
SOURCE = {"num_tasks": 2, "num_ranks": 2}
PROMPTS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        ("PromptTuningConfig", model, {"task_type": task, "prompt_tuning_init": start, **TOKENS})
        for model, task in (("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"))
        for start in ("RANDOM", "SAMPLE_VOCAB")
    ),
    *(
        (
            "MultitaskPromptTuningConfig",
            "llama",
            {"task_type": "CAUSAL_LM", "prompt_tuning_init": start, **TOKENS, **SOURCE},
        )
        for start in ("RANDOM", "SAMPLE_VOCAB")
    ),
    ("PromptEncoderConfig", "llama", {"task_type": "CAUSAL_LM", "encoder_hidden_size": 6, **TOKENS}),
    (
        "PromptEncoderConfig",
        "llama",
        {
            "task_type": "CAUSAL_LM",
            "encoder_hidden_size": 6,
            "encoder_reparameterization_type": "LSTM",
            "encoder_dropout": 0.0,
            **TOKENS,
        },
    ),
    *(
        ("CartridgeConfig", "llama", {"task_type": "CAUSAL_LM", "num_frozen_tokens": frozen, **TOKENS})
        for frozen in (0, 1)
    ),
    ("PrefixTuningConfig", "llama", {"task_type": "CAUSAL_LM", **TOKENS}),
    ("PrefixTuningConfig", "llama", {"task_type": "CAUSAL_LM", "init_weights": "zero", **TOKENS}),
    (
        "PrefixTuningConfig",
        "gpt2",
        {"task_type": "CAUSAL_LM", "prefix_projection": True, "encoder_hidden_size": 6, **TOKENS},
    ),
    (
        "CPTConfig",
        "llama",
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [1, 2, 3],
            "cpt_mask": [1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 4],
            "num_virtual_tokens": 3,
        },
    ),
    ("ShadowConfig", "llama", {"task_type": "CAUSAL_LM", "r": 3}),
    ("ShadowConfig", "gpt2", {"task_type": "CAUSAL_LM", "r": 3, "init_weights": False}),
    ("ShadowConfig", "llama", {"r": 3, "shadow_hidden_size": 8, "shadow_num_hidden_layers": 2}),
    ("AdaptionPromptConfig", "llama", {"task_type": "CAUSAL_LM", "adapter_len": 3, "adapter_layers": 2}),
]
NOT_POSSIBLE = {
    "BOTTLENECK": "PEFT has no such method",
    "LOREFT": "PEFT has no such method",
    "XLORA": "PEFT draws start values of every expert before it reads the expert from disk",
}
"""{method: why its start is another}. Starts of options that differ: docs/methods.md, "The same start as HF PEFT"."""


def test_every_method_is_compared() -> None:
    names = {name: m.config.__name__ for name, m in methods().items() if m.config.__module__.startswith("peftcore.")}
    compared = {*TABLE, *(config for config, _, _ in PROMPTS)}
    assert {name for name, config in names.items() if config not in compared} == set(NOT_POSSIBLE)


@pytest.mark.parametrize("config, number", CASES, ids=[f"{config}-{number}" for config, number in CASES])
def test_start(config: str, number: int) -> None:
    assert_same(*both("net", config, TABLE[config][number]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("config", TABLE)
def test_start_on_a_base_of_another_type(config: str, dtype: torch.dtype) -> None:
    cases = TABLE[config]
    for options in cases if dtype == torch.bfloat16 else cases[:: max(1, len(cases) // 3)]:
        if str(options.get("init_lora_weights")) in ("pissa", "pissa_niter_4", "olora") and dtype == torch.float64:
            continue  # PEFT refuses
        if config == "PsoftConfig" and dtype == torch.float64:
            continue  # PEFT refuses
        # DoRA's length rounded to 16 bits would not start at the base's own output, nor DEFT's R in PEFT's float32
        differs = "deft_R" if dtype == torch.float64 and options.get("init_weights") else "lora_magnitude_vector"
        assert_same(*both("net", config, options, dtype), except_for=differs)


@pytest.mark.parametrize("config, model, options", PROMPTS, ids=[f"{c}-{n}" for n, (c, _, _) in enumerate(PROMPTS)])
def test_start_of_a_prompt(config: str, model: str, options: dict[str, Any]) -> None:
    ours, theirs = both(model, config, options)
    here, there = tensors_of(ours), tensors_of(theirs)
    assert here.keys() == there.keys()
    for key in here:  # an encoder is saved by its output
        torch.testing.assert_close(here[key], there[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", ["PromptTuningConfig", "AdaptionPromptConfig"])
def test_start_of_a_prompt_on_a_base_of_another_type(config: str, dtype: torch.dtype) -> None:
    options = next(options for name, model, options in PROMPTS if name == config and model == "llama")
    assert_same(*both("llama", config, options, dtype))


@pytest.mark.parametrize("model", ["nf4", "nf4 in bf16", "int8"])
@pytest.mark.parametrize("more", [{}, {"init_lora_weights": "gaussian"}, {"use_dora": True}], ids=str)
def test_start_on_a_quantised_base(model: str, more: dict[str, Any]) -> None:
    ours, theirs = both(model, "LoraConfig", {"r": 4, "target_modules": ["0", "1"], **more})
    assert_same(ours, theirs, except_for="lora_magnitude_vector")


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_start_of_a_whole_model(model: str, targets: str | None) -> None:
    assert_same(*both(model, "LoraConfig", {"r": 4, "target_modules": targets}))


def test_start_of_further_adapters() -> None:
    pair = both("llama", "LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    for options in (
        {"r": 2, "target_modules": ["v_proj", "embed_tokens"], "init_lora_weights": "gaussian"},
        {"r": 3, "target_modules": ["q_proj", "down_proj"]},
    ):
        name, places = f"r{options['r']}", []
        for library, model in zip((peftcore, peft), pair, strict=True):
            torch.manual_seed(1)
            model.add_adapter(name, library.LoraConfig(**options))
            places.append(torch.rand(1))
        assert places[0] == places[1]
        assert_same(*pair, name)


def test_loading_draws_nothing(tmp_path: Path) -> None:
    model, _ = both("llama", "LoraConfig", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]})
    model.save_pretrained(tmp_path)
    base = build("llama")
    state = torch.get_rng_state()
    peftcore.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def pytorch_masks() -> Iterator[None]:
    """PyTorch's dropout masks, which `import peftcore.as_peft` chooses."""
    peftcore.set_dropout_masks("pytorch")
    yield
    peftcore.set_dropout_masks("fast")


# -- dropout -------------------------------------------------------------------------------------------------------

INPUTS: dict[str, Callable[[], Tensor]] = {
    "lin": lambda: torch.randn(2, 5, 12),
    "gpt": lambda: torch.randn(2, 5, 12),
    "conv1": lambda: torch.randn(2, 12, 9),
    "conv2": lambda: torch.randn(2, 6, 9, 9),
    "emb": lambda: torch.randint(20, (2, 5)),
}
DROPOUTS: list[tuple[str, str, dict[str, Any]]] = [
    *(("LoraConfig", layer, {"lora_dropout": 0.5, "init_lora_weights": False}) for layer in INPUTS),
    *(
        ("LoraConfig", layer, {"lora_dropout": 0.5, "use_dora": True, "init_lora_weights": False})
        for layer in ("lin", "gpt", "conv2", "emb")
    ),
    (
        "AdaLoraConfig",
        "lin",
        {"lora_dropout": 0.5, "init_lora_weights": False, "init_r": 3, "target_r": 2, "total_step": 9},
    ),
    ("DeloraConfig", "lin", {"module_dropout": 0.5, "init_weights": False}),
    ("FrodConfig", "lin", {"frod_dropout": 0.5, "init_weights": False, "progressbar": False}),
    ("DeftConfig", "lin", {"deft_dropout": 0.5, "init_weights": False, "init_scale": 50.0}),
    ("GraloraConfig", "lin", {"gralora_dropout": 0.5, "init_weights": False, "r": 4, "gralora_k": 2}),
    ("GraloraConfig", "lin", {"gralora_dropout": 0.5, "init_weights": False, "r": 4, "gralora_k": 2, "hybrid_r": 3}),
    ("HiraConfig", "lin", {"hira_dropout": 0.5, "init_weights": False}),
    ("LoHaConfig", "lin", {"init_weights": False}),
    *(("LoHaConfig", layer, {"rank_dropout": 0.5, "init_weights": False}) for layer in ("lin", "conv2")),
    *(
        ("LoKrConfig", layer, {"rank_dropout": 0.5, "rank_dropout_scale": scale, "init_weights": False})
        for layer in ("lin", "conv2")
        for scale in (True, False)
    ),
    *((config, "lin", {"module_dropout": 0.5, "init_weights": False}) for config in ("LoHaConfig", "LoKrConfig")),
    ("LoKrConfig", "lin", {"module_dropout": 0.5, "rank_dropout": 0.5, "init_weights": False}),
    ("MissConfig", "lin", {"miss_dropout": 0.5, "init_weights": False, "r": 4}),
    ("PsoftConfig", "lin", {"psoft_dropout": 0.5, "init_weights": False, "r": 3}),
    ("PveraConfig", "lin", {"init_weights": False, "generator_seed": 3, "r": 8}),
    ("PveraConfig", "lin", {"pvera_dropout": 0.5, "init_weights": False, "r": 8}),
    ("RandLoraConfig", "lin", {"randlora_dropout": 0.5, "init_weights": False}),
    ("SupertuningConfig", "lin", {"lora_dropout": 0.5, "init_weights": False, "r": 2, "sparsity": 0.5}),
    ("UniLoraConfig", "lin", {"unilora_dropout": 0.5, "init_theta_d_bound": 1.0}),
    *(
        ("TinyLoraConfig", layer, {"tinylora_dropout": 0.5, "init_weights": "uniform", "init_v_bound": 3.0})
        for layer in ("lin", "gpt", "emb")
    ),
    ("VBLoRAConfig", "lin", {"vblora_dropout": 0.5, "num_vectors": 8, "vector_length": 4}),
    ("VeraConfig", "lin", {"vera_dropout": 0.5, "init_weights": False}),
]


@pytest.mark.usefixtures("pytorch_masks")
@pytest.mark.parametrize("config, layer, options", DROPOUTS, ids=[f"{c}-{n}" for n, (c, _, _) in enumerate(DROPOUTS)])
@pytest.mark.parametrize("base_trains", [True, False])
def test_dropout_drops_the_same_elements(config: str, layer: str, options: dict[str, Any], base_trains: bool) -> None:
    """Right after `get_peft_model`, also on a base in evaluation mode."""
    ours, theirs = both("net", config, {"target_modules": [layer], **options}, training=base_trains)
    torch.manual_seed(7)
    x, results = INPUTS[layer](), []
    for module in (ours.get_submodule(layer), theirs.base_model.model.get_submodule(layer)):
        for seed in range(3):
            torch.manual_seed(seed)
            results.append((module(x), torch.rand(1)))
    for (here, place), (there, other_place) in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
        assert place == other_place
    if layer != "emb" and len(options) > 1:  # PEFT has no dropout on embeddings
        assert not torch.allclose(results[0][0], results[1][0])


# -- training ------------------------------------------------------------------------------------------------------

SOME = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, **SOME}),
    "LoRA with dropout": ("LoraConfig", {"r": 4, "lora_dropout": 0.3, **SOME}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True, **SOME}),
    "DoRA with dropout": ("LoraConfig", {"r": 4, "use_dora": True, "lora_dropout": 0.3, **SOME}),
    # PEFT adds its regulariser to the model's loss, ours belongs to the trainer
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 20, "orth_reg_weight": 1e-12, **SOME}),
    "IA3": ("IA3Config", {**SOME, "feedforward_modules": ["down_proj"]}),
    "VeRA": ("VeraConfig", {"r": 8, **SOME}),
    "PVeRA": ("PveraConfig", {"r": 8, **SOME}),
    "LoHa": ("LoHaConfig", {"r": 4, **SOME}),
    "LoKr": ("LoKrConfig", {"r": 4, **SOME}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, **SOME}),
    "prompt tuning": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", **TOKENS}),
    "prefix tuning": ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", **TOKENS}),
}


@pytest.mark.parametrize("method", TRAININGS)
def test_the_losses_of_a_seeded_training_are_the_same(method: str, request: pytest.FixtureRequest) -> None:
    if "dropout" in method:
        request.getfixturevalue("pytorch_masks")
    config, options = TRAININGS[method]
    curves = []
    for model in both("llama", config, options):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        model.train()
        for _ in range(10):
            tokens = torch.randint(1, 40, (2, 8))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=0, atol=1e-6)
