"""Trainable tokens: chosen rows train, the others stay, and a tied head follows."""

from typing import Any

import peft
import pytest
import torch
from method_example import Example, randomise
from safetensors.torch import load_file
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model
from peftcore.errors import MergeError
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.trainable_tokens import TrainableTokensConfig

EXAMPLE = Example(
    TrainableTokensConfig,
    options={"token_indices": [1, 5, 7]},
    second={"token_indices": [0, 2]},
    theirs="TrainableTokensConfig",
    parity={"plain": {"token_indices": [1, 5, 60]}, "one": {"token_indices": [30]}},
    families=("gpt2", "llama", "mistral", "bert"),
    targets={"gpt2": ["wte"], "llama": ["embed_tokens"], "mistral": ["embed_tokens"], "bert": ["word_embeddings"]},
)
pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about keys it does not know
TOKENS = torch.tensor([[1, 5, 7, 30, 2, 9]])


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    ).eval()


def test_only_the_chosen_rows_change() -> None:
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(nn.Embedding(9, 4)), EXAMPLE.make(target_modules=["0"]))
    before = net[0].base_layer.weight.clone()
    randomise(net, 1.0)
    after = net(torch.arange(9))
    changed = (after != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 5, 7]
    rows = adapter_set(net).adapters("default")["0"].trainable_tokens_delta
    assert torch.equal(after[[1, 5, 7]], rows)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_follows_and_another_does_not(tied: bool, tmp_path: Any) -> None:
    model = get_peft_model(llama(tied), TrainableTokensConfig(token_indices=[1, 5, 39]))
    layers = adapter_set(model).adapters("default")
    assert set(layers) == ({"model.embed_tokens", "lm_head"} if tied else {"model.embed_tokens"})
    assert sum(p.requires_grad for p in model.parameters()) == 1
    randomise(model, 1.0)
    logits, base = model(TOKENS).logits, llama(tied)(TOKENS).logits
    assert not torch.allclose(logits[..., 39], base[..., 39])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, logits)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{path}.trainable_tokens_delta" for path in layers
    }, "HF PEFT warns of a missing tensor unless each of the tied layers has its own"
    there = peft.PeftModel.from_pretrained(llama(tied), tmp_path).eval()
    torch.testing.assert_close(there(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_scaled_embedding_scales_the_trained_rows_too() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    model = GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    base = model(TOKENS).logits
    model = get_peft_model(model, TrainableTokensConfig(token_indices=[1, 5]))
    torch.testing.assert_close(model(TOKENS).logits, base)


@pytest.mark.parametrize("ids", [[1, 1], [-1], ["a"]])
def test_impossible_tokens(ids: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"different token ids|a list of integers; got \['a'\]"):
        TrainableTokensConfig(token_indices=ids)


def test_an_adapter_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="token_indices is empty"):
        get_peft_model(llama(True), TrainableTokensConfig())


def test_tokens_beyond_the_vocabulary_and_models_without_an_embedding() -> None:
    with pytest.raises(ConfigError, match="not among the 40 rows"):
        get_peft_model(llama(True), TrainableTokensConfig(token_indices=[40]))
    with pytest.raises(TargetError, match="give target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), TrainableTokensConfig(token_indices=[0]))


def test_tied_layers_with_different_tokens_train_their_own_rows() -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [1], "embed_tokens": [3]},
    }
    model = get_peft_model(llama(True), LoraConfig(**options))
    ours = {path: part for path, part in adapter_set(model).adapters("default").items() if "q_proj" not in path}
    assert {path: part.chosen for path, part in ours.items()} == {"lm_head": (1,), "model.embed_tokens": (3,)}
    theirs = peft.get_peft_model(llama(True), peft.LoraConfig(**options)).base_model.model
    assert theirs.lm_head.token_adapter.token_indices["default"] == model.lm_head.token_indices["default"] == [1]
    for library in (peftcore, peft):
        with pytest.raises(ValueError, match=r"ensure_weight_tying|weight tying"):
            library.get_peft_model(llama(True), library.LoraConfig(ensure_weight_tying=True, **options))


def test_rows_of_a_layer_that_trains_whole_are_refused() -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    for library in (peftcore, peft):
        config = library.LoraConfig(trainable_token_indices={"embed_tokens": [1]}, **options)
        with pytest.raises(ValueError, match=r"trains in full|trained fully"):
            library.get_peft_model(llama(False), config)


def test_two_adapters_with_a_common_token_are_not_merged_together() -> None:
    for library in (peftcore, peft):
        model = library.get_peft_model(llama(False), library.TrainableTokensConfig(token_indices=[0, 1]), "a")
        model.add_adapter("b", library.TrainableTokensConfig(token_indices=[1, 2]))
        with pytest.raises(ValueError, match=r"tokens \[1\]|already defined"):
            model.merge_and_unload(adapter_names=["a", "b"])
    model = get_peft_model(llama(False), TrainableTokensConfig(token_indices=[0, 1]), "a")
    model.add_adapter("b", TrainableTokensConfig(token_indices=[1, 2]))
    model.merge_adapter(["a"])
    with pytest.raises(
        MergeError, match=r"adapter 'b' cannot be merged: another adapter trains the rows of tokens \[1\]"
    ):
        model.merge_adapter(["b"])
