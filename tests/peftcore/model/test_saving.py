"""What is saved of an adapter, under the model's own paths."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from quiet_training import tiny_llama
from torch import nn

import peftcore
from peftcore import AdapterNameError, ConfigError, LoraConfig, get_peft_model
from peftcore.files.tensors import PREFIX


def test_the_adapters_state_by_the_models_own_paths(model: Any, tmp_path: Path) -> None:
    state = model.get_adapter_state_dict()
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert sorted(state) == [
        f"model.layers.0.self_attn.{layer}.lora_{letter}.weight" for layer in ("q_proj", "v_proj") for letter in "AB"
    ]
    assert all(not key.startswith(PREFIX) for key in model.get_adapter_state_dict("b"))
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert all(torch.equal(t, state[key] + 1) for key, t in model.get_adapter_state_dict(state_dict=other).items())


def test_the_default_adapter_is_in_the_directory_itself_and_others_below(model: Any, tmp_path: Path) -> None:
    model.add_adapter("default", LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    folders = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("adapter_config.json")}
    assert folders == {".", "a", "b"}


def test_nothing_is_saved_if_an_option_or_a_name_is_wrong(model: Any, tmp_path: Path) -> None:
    for options, error in (
        ({"safe_serialization": False}, ConfigError),
        ({"push_to_hub": True}, ConfigError),
        ({"nonsense": 1}, TypeError),
        ({"selected_adapters": ["a", "nothing"]}, AdapterNameError),
    ):
        with pytest.raises(error):
            model.save_pretrained(tmp_path / "out", **options)
    with pytest.warns(UserWarning, match="max_shard_size='1GB' has no effect"):
        model.save_pretrained(tmp_path / "sharded", max_shard_size="1GB")
    assert not (tmp_path / "out").exists()


def test_the_model_card_names_the_library(model: Any, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\nmy words")
    model.create_or_update_model_card(tmp_path)
    assert all(words in card.read_text() for words in ("library_name: peft", "license: mit", "my words"))


def test_a_directory_of_named_adapters_has_a_card_as_in_peft(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["0"]}
    for library, folder in ((peft, tmp_path / "theirs"), (peftcore, tmp_path / "ours")):
        model = library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.LoraConfig(**config), "first")
        model.save_pretrained(folder)
        (folder / "card").mkdir()
        model.create_or_update_model_card(folder / "card")
        for card in (folder / "README.md", folder / "card" / "README.md"):
            data = ModelCard.load(card).data
            assert (data.library_name, data.base_model, data.tags[-1]) == ("peft", None, "lora")
    assert "PeftModel.from_pretrained(model, 'directory/first')" in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:the base model's config.json is not found:UserWarning")
def test_the_hub_finds_the_card_of_an_adapter_by_its_base_and_its_task(tmp_path: Path) -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM", base_model_name_or_path="org/base")
    base = tiny_llama()
    base.add_model_tags(["of: the base"])
    model: Any = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "README.md").write_text("---\ntags: [mine]\n---\nmy words")
    model.create_or_update_model_card(tmp_path)
    found = {"base_model:adapter:org/base", "lora", "of: the base", "transformers"}
    for card, tags in ((tmp_path / "new" / "README.md", found), (tmp_path / "README.md", {*found, "mine"})):
        data = ModelCard.load(card).data
        assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "org/base", "text-generation")
        assert set(data.tags or ()) == tags
