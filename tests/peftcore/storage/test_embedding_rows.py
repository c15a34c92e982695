"""Embeddings that a directory holds beside its adapter, in HF PEFT's format, read and written both ways."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel as HfPeftModel
from peft import PromptTuningConfig as PeftPromptTuningConfig
from peft import TrainableTokensConfig as PeftTrainableTokensConfig
from peft import get_peft_model as hf_get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peftcore.export import ExportError, canonicalise, merge_streaming
from peftcore.routing import AdapterStore

pytestmark = [  # HF PEFT warns of its own doings
    pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning"),
    pytest.mark.filterwarnings(r"ignore::UserWarning:peft\."),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

VOCABULARY, RESIZED = 20, 22
EMBEDDINGS, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing of them": {"target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["two weights", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=request.param)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def resized(folder: Path, seed: int, size: int = RESIZED) -> Any:
    """The base with a larger vocabulary, whose new rows depend on the seed."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def randomised(model: Any) -> Any:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: Any, size: int = RESIZED) -> Tensor:
    return model(torch.arange(size)[None]).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("targets", OPTIONS)
def test_pefts_directory_gives_pefts_logits(targets: str, folder: Path, tmp_path: Path) -> None:
    theirs = randomised(hf_get_peft_model(resized(folder, 1), PeftLoraConfig(**OPTIONS[targets])))
    theirs.save_pretrained(str(tmp_path))
    base = resized(folder, 1 if targets == "embeddings" else 2)  # PEFT leaves the head beside targeted embeddings out
    before = logits(base)
    ours = PeftModel.from_pretrained(base, tmp_path)
    close(logits(ours), logits(theirs))
    assert torch.equal(logits(ours.unload()), before)


@pytest.mark.parametrize("targets", OPTIONS)
def test_nothing_of_a_resized_vocabulary_is_lost(targets: str, folder: Path, tmp_path: Path) -> None:
    ours = randomised(get_peft_model(resized(folder, 1), LoraConfig(**OPTIONS[targets])))
    ours.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(resized(folder, 2), tmp_path)), logits(ours))
    close(logits(HfPeftModel.from_pretrained(resized(folder, 3), str(tmp_path)).eval()), logits(ours))


def test_methods_without_targets_keep_their_embeddings_too(folder: Path, tmp_path: Path) -> None:
    tokens: dict[str, Any] = {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}
    prompt: dict[str, Any] = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    pairs = [
        (TrainableTokensConfig(**tokens), PeftTrainableTokensConfig(**tokens)),
        (PromptTuningConfig(**prompt), PeftPromptTuningConfig(**prompt)),
    ]
    for number, (config, hf_config) in enumerate(pairs):
        ours = randomised(get_peft_model(resized(folder, 1), config))
        ours.save_pretrained(tmp_path / f"ours {number}")
        close(logits(PeftModel.from_pretrained(resized(folder, 2), tmp_path / f"ours {number}")), logits(ours))
        theirs = randomised(hf_get_peft_model(resized(folder, 1), hf_config))
        theirs.save_pretrained(str(tmp_path / f"theirs {number}"))
        keys, hf_keys = (
            load_file(tmp_path / f"{who} {number}/adapter_model.safetensors") for who in ("ours", "theirs")
        )
        assert {key for key in hf_keys if "token_adapter" not in key and "delta" not in key} <= keys.keys()


@pytest.mark.parametrize("choice", [True, False, "auto"])
@pytest.mark.parametrize("targets", ["nothing of them", "embeddings"])
def test_the_choice_means_what_it_means_in_peft(choice: Any, targets: str, folder: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained
    theirs = hf_get_peft_model(base(folder), PeftLoraConfig(**OPTIONS[targets]))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=choice)
    ours = get_peft_model(base(folder), LoraConfig(**OPTIONS[targets]))
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=choice)
    keys, hf_keys = (load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("ours", "theirs"))
    assert keys == hf_keys


@pytest.mark.parametrize("choice", ["auto", True])
def test_embeddings_that_a_given_state_dictionary_lacks_are_left_out(choice: Any, folder: Path, tmp_path: Path) -> None:
    saved = {}
    for library in (peftcore, peft):
        config = library.LoraConfig(target_modules=["q_proj", "embed_tokens"])
        model = library.get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
        factors = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
        given = {"factors": factors, "all": model.state_dict()}
        for name, state_dict in given.items():
            directory = tmp_path / library.__name__ / name
            model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=choice)
            saved[library, name] = load_file(directory / "adapter_model.safetensors").keys()
    assert saved[peftcore, "factors"] == saved[peft, "factors"] < saved[peftcore, "all"] == saved[peft, "all"]


def test_another_word_and_a_model_without_embeddings_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="must be True, False or 'auto'; got 'always'"):
        model.save_pretrained(tmp_path, save_embedding_layers="always")
    with pytest.raises(ConfigError, match="names no embeddings"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert not any(tmp_path.iterdir())


def test_a_base_that_cannot_be_found_is_said(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "gone"))
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    with pytest.warns(UserWarning, match="save with save_embedding_layers=True"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, save_embedding_layers=False)


def saved(folder: Path, to: Path, seed: int, **options: Any) -> Any:
    model = randomised(get_peft_model(resized(folder, seed), LoraConfig(**(options or OPTIONS["nothing of them"]))))
    model.save_pretrained(to)
    return model


def test_a_model_from_a_subfolder_counts_as_not_resized(folder: Path, tmp_path: Path) -> None:
    """In a folder without config.json, such as a diffusion pipeline's, transformers reads default values."""
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "pipeline" / "text_encoder")
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "pipeline", subfolder="text_encoder")
    with pytest.warns(UserWarning, match=r"config.json is not found at .*pipeline"):
        get_peft_model(model, LoraConfig(**OPTIONS["nothing of them"])).save_pretrained(tmp_path / "adapter")
    assert not {EMBEDDINGS, HEAD} & set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_another_vocabulary_says_what_to_call(folder: Path, tmp_path: Path) -> None:
    saved(folder, tmp_path, 1)
    base = LlamaForCausalLM.from_pretrained(folder)
    modules = dict(base.named_modules())
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(22\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules


def test_own_embeddings_come_back_where_the_model_is_now(folder: Path, tmp_path: Path) -> None:
    saved(folder, tmp_path, 1)
    base = resized(folder, 3)
    expected = base.get_input_embeddings().weight.detach().double()
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    plain = PeftModel.from_pretrained(base, tmp_path).double().unload()
    assert torch.equal(plain.get_input_embeddings().weight, expected)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    assert logits(plain).dtype == torch.float64


def test_loaded_embeddings_change_no_other_adapter(folder: Path, tmp_path: Path) -> None:
    first, second = saved(folder, tmp_path / "first", 1), saved(folder, tmp_path / "second", 2)
    model = PeftModel.from_pretrained(resized(folder, 3), tmp_path / "first", "first")
    with pytest.raises(CheckpointError, match=r"would change adapters \['first'\]"):
        model.load_adapter(tmp_path / "second", "second")
    assert list(model.peft_config) == ["first"]
    close(logits(model), logits(first))
    model.load_adapter(tmp_path / "first", "again")  # with the same embeddings
    model.set_adapter("again")
    model.delete_adapter("first")
    close(logits(model), logits(first))
    model.delete_adapter("again")
    model.load_adapter(tmp_path / "second", "second")
    model.set_adapter("second")
    close(logits(model), logits(second))
    with model.disable_adapter(), second.disable_adapter():
        close(logits(model), logits(second))


def test_deleting_the_last_adapter_puts_the_models_own_back(folder: Path, tmp_path: Path) -> None:
    saved(folder, tmp_path, 1)
    base = resized(folder, 3)
    own, before = base.get_input_embeddings().weight, logits(base)
    model = PeftModel.from_pretrained(base, tmp_path)
    assert model.get_input_embeddings().weight is not own
    model.delete_adapter("default")
    assert model.get_input_embeddings().weight is own and torch.equal(logits(model), before)


def test_they_are_saved_again_and_stay_after_a_merge(folder: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(folder)  # no vocabulary was resized, yet the rows are other ones
    nn.init.normal_(base.get_input_embeddings().weight, std=0.3)
    first = randomised(get_peft_model(base.eval(), LoraConfig(**OPTIONS["nothing of them"])))
    first.save_pretrained(tmp_path / "one", save_embedding_layers=True)
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    model = PeftModel.from_pretrained(plain, tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder).eval(), tmp_path / "two")
    close(logits(again, VOCABULARY), logits(first, VOCABULARY))
    close(logits(again.merge_and_unload(), VOCABULARY), logits(first, VOCABULARY))


def test_weights_of_a_saved_adapter_are_read_with_their_embeddings(folder: Path, tmp_path: Path) -> None:
    first = saved(folder, tmp_path, 1)
    model = get_peft_model(resized(folder, 3), LoraConfig(**OPTIONS["nothing of them"])).eval()
    model.load_adapter_weights(tmp_path)
    close(logits(model), logits(first))


@pytest.mark.parametrize("targets", ["nothing of them", "embeddings"])
def test_a_merge_of_files_has_them(targets: str, folder: Path, tmp_path: Path) -> None:
    first = saved(folder, tmp_path / "adapter", 1, **OPTIONS[targets])
    resized(folder, 3).save_pretrained(tmp_path / "base")
    merge_streaming(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), logits(first))


def test_an_export_of_the_adapter_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    saved(folder, tmp_path / "adapter", 1)
    model = PeftModel.from_pretrained(resized(folder, 3), tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        with pytest.raises(ExportError, match="embeddings"):
            canonicalise(source)


def test_a_store_refuses_an_adapter_that_would_change_its_base(folder: Path, tmp_path: Path) -> None:
    saved(folder, tmp_path / "adapter", 1)
    model = resized(folder, 3)
    before = logits(model)
    store = AdapterStore(model)
    store.register("a", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="embeddings differ"):
        store.acquire("a")
    assert torch.equal(logits(model), before)
    same = AdapterStore(resized(folder, 1))
    same.register("a", tmp_path / "adapter")
    same.acquire("a").release()


def test_two_weights_do_not_fit_into_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    get_peft_model(base, LoraConfig(**OPTIONS["nothing of them"])).save_pretrained(tmp_path, save_embedding_layers=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, EMBEDDINGS: tensors[EMBEDDINGS] + 1, HEAD: tensors[HEAD] + 2}, file)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="one weight for input and output embeddings"):
        PeftModel.from_pretrained(LlamaForCausalLM(base.config), tmp_path)
