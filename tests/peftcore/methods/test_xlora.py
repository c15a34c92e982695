"""X-LoRA on whole models: its formula, its two passes, its directories both ways."""

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import peft
from method_example import Example, randomise
from parity_log import agree
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peftcore import CheckpointError, ConfigError, LoraConfig, MergeError, PeftModel, TargetError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.xlora import Mixture, XLoraConfig

EXAMPLE = Example(XLoraConfig, options={"hidden_size": 32, "adapters": {"0": "unread"}}, whole_model=True)
TARGETS = [["q_proj", "down_proj"], ["q_proj", "embed_tokens"], ["v_proj"]]
"""What the three LoRAs adapt: some layers have one of them, some two."""


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "initializer_range": 0.2,
    "use_cache": False,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return trained_loras(tmp_path_factory.mktemp("loras"), "llama")


def trained_loras(folder: Path, family: str) -> dict[str, str]:
    """{class: directory} of three LoRAs on one base."""
    found = {}
    for n, targets in enumerate(TARGETS):
        config = LoraConfig(r=2 + n, lora_alpha=6, target_modules=targets)
        model = get_peft_model(build(family), config)
        randomise(model, 0.3, seed=n)
        directory = folder / str(n)
        model.save_pretrained(directory)
        found[str(n)] = str(directory)
    return found


def config(loras: dict[str, str], **options: Any) -> XLoraConfig:
    return XLoraConfig(hidden_size=32, adapters=loras, task_type="CAUSAL_LM", **options)


def mixed(loras: dict[str, str], family: str = "llama", **options: Any) -> Any:
    model = get_peft_model(build(family), config(loras, **options)).eval()
    randomise(model, 0.5)
    return model


def mixture(model: nn.Module) -> Mixture:
    shared = adapter_set(model).shared("default")
    assert isinstance(shared, Mixture)
    return shared


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 60, (2, 7))


def lora_alone(loras: dict[str, str], n: int) -> Any:
    return PeftModel.from_pretrained(llama(), loras[str(n)])


def test_a_weight_of_one_is_that_lora_and_weights_of_zero_are_the_base(loras: dict[str, str]) -> None:
    model = mixed(loras, enable_softmax=False)
    last: Any = mixture(model).internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        torch.testing.assert_close(model(tokens()).logits, llama()(tokens()).logits)
        for n in range(3):
            last.bias.zero_()[n] = 1.0
            expected = lora_alone(loras, n)(tokens()).logits
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_each_token_and_layer_has_its_own_weights(loras: dict[str, str]) -> None:
    """One layer in float64 against the sum that the paper writes."""
    model = mixed(loras, layerwise_scalings=True).double()
    layer = model.model.layers[1].self_attn.q_proj
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(tokens())
    scalings = mixture(model).scalings
    assert scalings is not None and scalings.shape == (2, 7, 7, 3)  # embedding, and q, v, down in two blocks
    torch.testing.assert_close(scalings.sum(-1), torch.ones(2, 7, 7, dtype=torch.float64))
    assert scalings.std(0).min() > 0 and scalings.std(1).min() > 0 and scalings.std(2).min() > 0
    own = scalings[:, :, mixture(model).numbers["model.layers.1.self_attn.q_proj"]]
    expected = layer.base_layer(seen["x"])
    for n in (0, 1):
        expert = lora_alone(loras, n).double().model.layers[1].self_attn.q_proj.adapters["default"]
        expected = expected + own[..., n, None] * (seen["x"] @ expert.delta_weight().T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-10, atol=1e-10)


def test_the_weights_come_from_a_pass_over_the_base(loras: dict[str, str]) -> None:
    model = mixed(loras)
    model(tokens(), labels=tokens())
    hidden = llama()(tokens(), output_hidden_states=True).hidden_states[-1]
    classifier = mixture(model).internal_xlora_classifier
    torch.testing.assert_close(mixture(model).scalings, classifier(hidden))


def test_top_k_and_its_softmax(loras: dict[str, str]) -> None:
    shared = mixture(mixed(loras, enable_softmax=False, top_k_lora=2, enable_softmax_topk=True))
    s = torch.tensor([[[[0.5, 2.0, 1.0]]]])
    expected = torch.tensor([0.0, *torch.tensor([2.0, 1.0]).softmax(0)])
    torch.testing.assert_close(shared.chosen(s)[0, 0, 0], expected)
    shared.config = dataclasses.replace(shared.config, enable_softmax_topk=False)
    torch.testing.assert_close(shared.chosen(s)[0, 0, 0], torch.tensor([0.0, 2.0, 1.0]))


def test_only_the_classifier_trains_and_with_the_option_the_loras_too(loras: dict[str, str]) -> None:
    model = mixed(loras, layerwise_scalings=True).train()
    model(tokens(), labels=tokens()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("internal_xlora_classifier" in name for name in trained)
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.set_requires_grad("default", True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained

    model = mixed(loras, use_trainable_adapters=True)
    model(tokens(), labels=tokens()).loss.backward()
    loras_too = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    assert len(loras_too) == 2 * sum((4, 3, 2)) and all(p.grad is not None for p in loras_too)


def test_gradient_checkpointing_gives_the_same_gradients(loras: dict[str, str]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = mixed(loras).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append(mixture(model).internal_xlora_classifier.layers[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_generate_equals_repeated_forwards(loras: dict[str, str]) -> None:
    model = mixed(loras)
    row = tokens()[:1]
    found = model.generate(row, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        row = torch.cat([row, model(row).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, row)
    cache = llama()(tokens(), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="use_cache=False"):
        model(tokens(), past_key_values=cache)


def test_disabled_deleted_and_unloaded_is_the_base(loras: dict[str, str]) -> None:
    model = mixed(loras)
    base = llama()(tokens()).logits
    assert (model(tokens()).logits - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, base)
    with pytest.raises(MergeError, match=r"XLORA.s weights depend on the token"):
        model.merge_adapter()
    assert torch.equal(copy.deepcopy(model).unload()(tokens()).logits, base)


def test_copies_after_a_forward_with_gradients(loras: dict[str, str]) -> None:
    model = mixed(loras)
    logits = model(tokens()).logits
    assert mixture(model).scalings is not None and mixture(model).scalings.requires_grad
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, logits)
    assert pickle.loads(pickle.dumps(mixture(model))).scalings is None


def test_the_log_gathers_weights(loras: dict[str, str]) -> None:
    model = mixed(loras)
    mixture(model).log = []
    model(tokens())
    model(tokens()[:1, :3])
    assert [tuple(s.shape) for s in mixture(model).log or []] == [(2, 7, 1, 3), (1, 3, 1, 3)]


def test_half_precision(loras: dict[str, str]) -> None:
    model = get_peft_model(llama().bfloat16(), config(loras, xlora_depth=2, xlora_size=16))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model(tokens()).logits.dtype == torch.bfloat16


# -- disk ------------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise and deep": {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 16, "softmax_temperature": 0.5},
    "deep without dropout": {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0},
    "no softmax": {"enable_softmax": False, "global_scaling_weight": 0.5},
    "top k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "scaling_pass_value": 0.25},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family, case", [*(("llama", case) for case in CASES), ("mistral", "plain"), ("qwen2", "plain")]
)
def test_parity_both_ways(family: str, case: str, tmp_path: Path) -> None:
    options, loras = CASES[case], trained_loras(tmp_path / "loras", family)
    theirs = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=dict(loras), **options)
    hf = peft.get_peft_model(build(family), theirs).eval()
    randomise(hf, 0.5)
    hf.save_pretrained(tmp_path / "hf")
    # PEFT 0.21.2 leaves out the classifier's layers whose number is the name that it gives to a LoRA
    whole = {key: tensor for key, tensor in hf.state_dict().items() if "internal_xlora_classifier" in key}
    save_file(whole, tmp_path / "hf" / "adapter_model.safetensors")
    expected = hf(input_ids=tokens()).logits
    here = PeftModel.from_pretrained(build(family), tmp_path / "hf")
    assert (expected - build(family)(tokens()).logits).abs().max() > 1e-2
    agree(here(tokens()).logits, expected, "XLORA", family, made_by="peft")

    model = mixed(loras, family, **options)
    model.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    agree(model(tokens()).logits, there(input_ids=tokens()).logits, "XLORA", family, made_by="peftcore")


@pytest.mark.filterwarnings("ignore")
def test_trained_loras_are_saved_here_and_read_by_peft(loras: dict[str, str], tmp_path: Path) -> None:
    model = mixed(loras, use_trainable_adapters=True)
    frozen = mixed(loras)(tokens()).logits
    expected = model(tokens()).logits
    assert (expected - frozen).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(tokens()).logits, expected)
    there = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(there(input_ids=tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_loras_that_peft_wrote(tmp_path: Path) -> None:
    hf = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path)  # with the embedding's own weight
    model = mixed({"0": str(tmp_path)})  # a softmax over one LoRA gives it the weight 1
    torch.testing.assert_close(model(tokens()).logits, hf(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_save_and_load_keeps_the_classes_in_order(loras: dict[str, str], tmp_path: Path) -> None:
    names = {"10": loras["1"], "9": loras["0"], "11": loras["2"]}
    assert [str(d) for d in config(names).directories()] == list(loras.values())
    model = mixed(names)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert "target_modules" not in (tmp_path / "adapter_config.json").read_text()


# -- what may not be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": None}, "hidden_size is needed"),
        ({"adapters": {}}, "adapters is needed"),
        ({"xlora_depth": 0}, "xlora_depth must be a positive integer; got 0"),
        ({"xlora_dropout_p": 1.0}, "below 1; got 1.0"),
        ({"softmax_temperature": 0}, "above 0; got 0"),
        ({"top_k_lora": 2}, "top_k_lora must be 1 to 1; got 2"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XLoraConfig(**{"hidden_size": 32, "adapters": {"0": "somewhere"}, **options})


def test_two_softmaxes_warn() -> None:
    with pytest.warns(UserWarning, match="softmax over a softmax"):
        XLoraConfig(hidden_size=8, adapters={"0": "x"}, top_k_lora=1, enable_softmax_topk=True)


def test_loras_of_a_base_with_other_embeddings_are_refused(loras: dict[str, str]) -> None:
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[5] += 1
    with pytest.raises(CheckpointError, match=r"holds embeddings of model\.embed_tokens that differ from the model's"):
        get_peft_model(other, config(loras))


def test_loras_that_do_not_fit(loras: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter directory"):
        get_peft_model(llama(), config({"0": str(tmp_path / "nowhere")}))
    bert: Any = BertForSequenceClassification(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with pytest.raises(TargetError, match="which is not in BertForSequenceClassification"):
        get_peft_model(bert, config(loras))
    for name, options in {"use_dora": {"use_dora": True}, "trained biases": {"bias": "all"}}.items():
        get_peft_model(bert, LoraConfig(r=2, target_modules=["query"], **options)).save_pretrained(tmp_path / name)
        bert = bert.unload()
        with pytest.raises(ConfigError, match=name):
            get_peft_model(bert, XLoraConfig(hidden_size=32, adapters={"0": str(tmp_path / name)}))
    wrong = get_peft_model(llama(), XLoraConfig(hidden_size=16, adapters=loras))
    with pytest.raises(ConfigError, match="hidden states of size 32; hidden_size=16"):
        wrong(tokens())


def test_encoders_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    bert: Any = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, initializer_range=0.2)).eval()
    donor = get_peft_model(bert, LoraConfig(r=2, target_modules=["query", "value"]))
    randomise(donor, 0.3)
    donor.save_pretrained(tmp_path)
    bert = donor.unload()
    base = bert(tokens()).logits.detach()
    model = get_peft_model(bert, XLoraConfig(hidden_size=32, adapters={"one": str(tmp_path)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (model(tokens()).logits - base).abs().max() > 1e-4
