"""State dicts under HF PEFT's keys: each library reads what the other returns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from lora_nets import llama
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import peftcore
from peftcore import (
    CheckpointError,
    LoraConfig,
    MergeError,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peftcore.errors import SizeMismatchError


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


OPTIONS: dict[str, Any] = {"r": 2, "target_modules": ["0"], "modules_to_save": ["2"], "init_lora_weights": False}
X = torch.randn(3, 4)


def test_peft_reads_our_state_dict_and_we_read_its() -> None:
    ours = get_peft_model(base(), LoraConfig(**OPTIONS))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**OPTIONS), "other")
    result = peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours), "other")
    assert not result.unexpected_keys
    torch.testing.assert_close(theirs(X), ours(X))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs, adapter_name="other")) == ([], [])
    torch.testing.assert_close(ours(X), theirs(X))


def test_keys_of_a_model_whose_class_is_unchanged_have_no_prefix() -> None:
    plain = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), base())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), base())
    state_dict = get_peft_model_state_dict(plain)
    assert state_dict.keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert set_peft_model_state_dict(plain, state_dict) == ([], [])
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in state_dict.items()}
    assert set_peft_model_state_dict(plain, wrapped) == ([], [])


def test_a_prompt_has_a_state_dict() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    ours = get_peft_model(model, peftcore.PromptTuningConfig(**options))
    values = {key: torch.full_like(tensor, 0.5) for key, tensor in get_peft_model_state_dict(ours).items()}
    assert set_peft_model_state_dict(ours, values) == ([], [])
    assert all((tensor == 0.5).all() for tensor in get_peft_model_state_dict(ours).values())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_the_head_that_trains_beside_a_prompt_is_part_of_its_state_dict() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    config = LlamaConfig(**sizes, pad_token_id=0)
    theirs = peft.get_peft_model(LlamaForSequenceClassification(config), peft.PromptTuningConfig(**options))
    ours = get_peft_model(LlamaForSequenceClassification(config), peftcore.PromptTuningConfig(**options))
    values = peft.get_peft_model_state_dict(theirs)
    assert set_peft_model_state_dict(ours, values) == ([], [])
    written = get_peft_model_state_dict(ours)
    assert written.keys() == values.keys() == {"base_model.score.weight", "prompt_embeddings"}
    assert all(torch.equal(tensor, values[key]) for key, tensor in written.items())
    partial = {"prompt_embeddings": torch.zeros(3, 8)}
    assert set_peft_model_state_dict(ours, partial) == (["base_model.score.modules_to_save.default.weight"], [])
    assert torch.equal(get_peft_model_state_dict(ours)["base_model.score.weight"], values["base_model.score.weight"])


def test_what_is_missing_or_unexpected_is_returned_and_the_rest_is_written() -> None:
    model = get_peft_model(base(), LoraConfig(**OPTIONS), "other")
    state_dict = {
        key: torch.zeros_like(tensor) for key, tensor in get_peft_model_state_dict(model, None, "other").items()
    }
    kept = model[0].lora_A["other"].weight.clone()
    del state_dict["base_model.model.0.lora_A.weight"]
    state_dict["base_model.model.1.lora_A.weight"] = torch.zeros(1)
    result = set_peft_model_state_dict(model, state_dict, "other")
    assert result.missing_keys == ["base_model.model.0.lora_A.other.weight"]
    assert result.unexpected_keys == ["base_model.model.1.lora_A.weight"]
    assert torch.equal(model[0].lora_A["other"].weight, kept)
    assert not model[0].lora_B["other"].weight.any()


def test_another_shape_is_an_error_unless_it_may_be_skipped() -> None:
    small, large = (get_peft_model(base(), LoraConfig(**OPTIONS | {"modules_to_save": None, "r": r})) for r in (2, 3))
    state_dict = get_peft_model_state_dict(large)
    before = get_peft_model_state_dict(small)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is \[3, 4\], here \[2, 4\]"):
        set_peft_model_state_dict(small, state_dict)
    with pytest.warns(UserWarning, match="another shape are skipped"):
        result = set_peft_model_state_dict(small, state_dict, ignore_mismatched_sizes=True)
    assert len(result.missing_keys) == 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in get_peft_model_state_dict(small).items())


def test_values_can_come_from_a_given_state_dict() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    gathered = {key: torch.full_like(tensor, 2) for key, tensor in model.state_dict().items()}
    assert all((tensor == 2).all() for tensor in get_peft_model_state_dict(model, gathered).values())


def test_the_bases_state_dict_is_that_of_the_plain_model() -> None:
    model = get_peft_model(base(), LoraConfig(**OPTIONS))
    ours, plain = get_base_model_state_dict(model), base().state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in ours.items())
    set_base_model_state_dict(model, {key: tensor + 1 for key, tensor in plain.items()})
    assert all(torch.equal(tensor, plain[key] + 1) for key, tensor in model.unload().state_dict().items())


def test_the_bases_state_dict_must_fit_unless_it_need_not() -> None:
    model = get_peft_model(base(), LoraConfig(**OPTIONS))
    partial = {"0.weight": torch.zeros(5, 4), "9.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Missing keys: \['0\.bias', .*Unexpected keys: \['9\.weight'\]"):
        set_base_model_state_dict(model, partial)
    result = set_base_model_state_dict(model, partial, strict=False)
    assert result.unexpected_keys == ["9.weight"]
    assert not model.unload()[0].weight.any()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, of FSDP on a CPU
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("further", [{}, {"bias": "all", "modules_to_save": None}], ids=["module", "biases"])
def test_a_model_inside_of_fsdp(further: dict[str, Any], nested: bool, one_process: None) -> None:
    """The keys and values are those from before, as with HF PEFT, whose own function is called for comparison."""
    device, keys = torch.device("cpu"), []
    for library in (peft, peftcore):
        config = library.LoraConfig(**{**OPTIONS, **further})
        model: Any = library.get_peft_model(base(), config)
        before = {k: t.clone() for k, t in library.get_peft_model_state_dict(model).items()}
        if nested and library is peftcore:
            model[0] = FullyShardedDataParallel(model[0], use_orig_params=True, device_id=device)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
        state = library.get_peft_model_state_dict(wrapped)
        assert state.keys() == before.keys()
        for key, tensor in before.items():
            assert torch.equal(state[key], tensor)
        keys.append(state.keys())
    assert keys[0] == keys[1]


def test_tensors_of_the_base_are_written_into_it_as_in_peft() -> None:
    trained = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"], bias="all"))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    state_dict = peft.get_peft_model_state_dict(trained)
    ours = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="tensors of the base are changed"):
        result = set_peft_model_state_dict(ours, state_dict)
    assert not result.unexpected_keys
    torch.testing.assert_close(ours(X), trained(X))
    ours.merge_adapter()
    state_dict = {key: tensor + 1 for key, tensor in state_dict.items()}
    with pytest.raises(MergeError, match="call unmerge_adapter first"):
        set_peft_model_state_dict(ours, state_dict)


def test_the_bases_state_dict_is_not_loaded_where_unmerging_or_deleting_would_undo_it(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(**OPTIONS))
    changed = {key: tensor + 1 for key, tensor in base().state_dict().items()}
    with model.merged(), pytest.raises(MergeError, match=r"\['default'\] are merged .* call unmerge_adapter first"):
        set_base_model_state_dict(model, changed)
    set_base_model_state_dict(model, changed)
    assert all(torch.equal(tensor, changed[key]) for key, tensor in get_base_model_state_dict(model).items())

    loftq = LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config={"loftq_bits": 8})
    model = get_peft_model(base(), loftq)
    present = get_base_model_state_dict(model)
    set_base_model_state_dict(model, present)  # nothing changes, so nothing is lost
    with pytest.raises(MergeError, match=r"adapters have replaced \['0\.weight'\]"):
        set_base_model_state_dict(model, present | {"0.weight": changed["0.weight"]})
    set_base_model_state_dict(model, changed | {"0.weight": present["0.weight"]})
    assert torch.equal(model.unload()[0].bias, changed["0.bias"])


def test_the_bases_state_dict_is_not_loaded_into_embeddings_that_came_with_an_adapter(tmp_path: Path) -> None:
    trained = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        trained.model.embed_tokens.weight.add_(1)
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(MergeError, match=r"adapters have replaced \['model\.embed_tokens\.weight'\]"):
        set_base_model_state_dict(model, llama().state_dict())


def test_tensors_of_the_base_of_another_shape_are_skipped_as_those_of_the_adapter() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    state_dict = get_peft_model_state_dict(model) | {"base_model.model.2.bias": torch.ones(7)}
    with pytest.raises(SizeMismatchError, match=r"model\.2\.bias is \[7\], here \[3\]"):
        set_peft_model_state_dict(model, state_dict)
    with pytest.warns(UserWarning, match=r"another shape are skipped: base_model\.model\.2\.bias is \[7\]"):
        result = set_peft_model_state_dict(model, state_dict, ignore_mismatched_sizes=True)
    assert result == ([], []) and torch.equal(model[2].bias, base()[2].bias)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"]))
    state_dict["base_model.model.0.base_layer.bias"] = state_dict.pop("base_model.model.2.bias")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(theirs, state_dict)
    with pytest.warns(UserWarning, match="found shape torch.Size"):
        peft.set_peft_model_state_dict(theirs, state_dict, ignore_mismatched_sizes=True)
