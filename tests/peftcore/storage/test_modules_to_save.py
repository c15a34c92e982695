"""Names in `modules_to_save` match the ends of module names, as in HF PEFT."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_hf_pefts_adapter_with_all_norms_gives_hf_pefts_logits(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    ours = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert sum("modules_to_save" in name for name, _ in ours.named_parameters()) == 5  # two in each layer, and the last
    again = tmp_path / "again"
    ours.save_pretrained(again)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(llama(), again)(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), again)(ids).logits, theirs(ids).logits)


def test_two_of_hf_pefts_adapters_with_all_norms_load_onto_one_model(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)


def test_a_name_matches_the_modules_that_it_matches_in_hf_peft(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"], "r": 2}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    ours = get_peft_model(llama(), LoraConfig(**options)).eval()
    assert names_of_copies(ours) == {name.removeprefix("base_model.model.") for name in names_of_copies(theirs)}
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    ours.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    for library in (peft, peftcore):
        again: Any = library.PeftModel.from_pretrained(llama(), tmp_path)
        assert set(again.peft_config["default"].modules_to_save) == {"norm", "embed_tokens"}
        torch.testing.assert_close(again(ids).logits, ours(ids).logits)


def test_both_untrained_layers_of_distilberts_head_train_as_in_hf_peft() -> None:
    def classifier() -> DistilBertForSequenceClassification:
        return DistilBertForSequenceClassification(
            DistilBertConfig(dim=16, hidden_dim=24, n_heads=2, n_layers=1, vocab_size=32)
        )

    options: dict[str, Any] = {"target_modules": ["q_lin"], "task_type": "SEQ_CLS", "r": 2}
    of_both = [
        names_of_copies(library.get_peft_model(classifier(), library.LoraConfig(**options)))
        for library in (peft, peftcore)
    ]
    assert (
        {name.removeprefix("base_model.model.") for name in of_both[0]}
        == of_both[1]
        == {"pre_classifier", "classifier"}
    )
    everywhere = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    assert names_of_copies(everywhere) == {"pre_classifier", "classifier"}
    assert not any("classifier" in path for path in adapter_set(everywhere).layers)


def test_an_adapter_of_an_earlier_version_loads_without_the_modules_that_it_lacks(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm", "embed_tokens"])
    ours = get_peft_model(llama(), config).eval()
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    ours.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("model.norm", "norm"), encoding="utf-8")
    (tmp_path / "SHA256SUMS").unlink()
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(again(ids).logits, ours(ids).logits)
    assert names_of_copies(again) == {"model.norm", "model.embed_tokens"}


def test_a_module_inside_of_another_one_that_matches_trains_with_it() -> None:
    model = nn.Sequential(OrderedDict(q=nn.Linear(4, 4), pre_head=nn.Sequential(OrderedDict(head=nn.Linear(4, 4)))))
    ours = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=["head"], r=2))
    assert names_of_copies(ours) == {"pre_head"}


def names_of_copies(model: nn.Module) -> set[str]:
    """Return the paths of the modules that an adapter trains in full, as both libraries name their parameters."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.partition(".modules_to_save.")[0] for name in names if ".modules_to_save." in name}
