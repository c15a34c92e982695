"""The base that a configuration names is loaded with its adapter, as HF PEFT does."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub_server import HubServer, use
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import peftcore
from peftcore import AutoPeftModel, AutoPeftModelForCausalLM, ConfigError, LoraConfig, get_peft_model
from peftcore.hf_peft import auto

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
"""HF PEFT reads this property of transformers."""
IDS = torch.arange(3, 11).view(2, 4)


def saved(base: Path, directory: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.detach().float()


def test_the_base_and_the_adapter_are_loaded(tiny_base: Path, tmp_path: Path) -> None:
    adapter = saved(tiny_base, tmp_path / "adapter", task_type="CAUSAL_LM")
    ours = AutoPeftModelForCausalLM.from_pretrained(adapter, "mine", is_trainable=True, dtype=torch.float32)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs))
    assert type(ours).__name__ == "LlamaForCausalLM" and list(ours.peft_config) == ["mine"]
    assert any(p.requires_grad for p in ours.parameters())


def test_embeddings_grow_to_the_tokenizer_beside_the_adapter(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ours = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.bfloat16)
    assert len(ours.get_input_embeddings().weight) == len(tokenizer)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.02, atol=0.02)


def test_the_class_that_the_configuration_names(tiny_base: Path, tmp_path: Path) -> None:
    adapter = saved(tiny_base, tmp_path / "adapter")
    model = AutoPeftModel.from_pretrained(adapter)
    assert isinstance(model, LlamaForCausalLM)
    torch.testing.assert_close(logits(model), logits(AutoPeftModelForCausalLM.from_pretrained(adapter)))
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    (adapter / "SHA256SUMS").unlink()
    for mapping, message in {
        ("subprocess", "Popen"): r"asks to import 'subprocess'.*import_allowlist=\['subprocess'\]",
        ("transformersx", "A"): "asks to import 'transformersx'",
        ("transformers", "Missing"): "transformers has no class 'Missing' with from_pretrained",
        ("transformers", "__version__"): "has no class '__version__'",
        (None, None): "must have parent_library",
    }.items():
        named = dict(zip(("parent_library", "base_model_class"), mapping, strict=True))
        path.write_text(json.dumps(values | {"auto_mapping": named}))
        with pytest.raises(ConfigError, match=message):
            AutoPeftModel.from_pretrained(adapter)
    path.write_text(json.dumps(values | {"auto_mapping": None}))
    with pytest.raises(ConfigError, match="AutoPeftModel needs auto_mapping"):
        AutoPeftModel.from_pretrained(adapter)
    path.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base model; load the base yourself"):
        AutoPeftModel.from_pretrained(adapter)


def test_another_task_is_refused_with_the_class_to_use(tiny_base: Path, tmp_path: Path) -> None:
    adapter = saved(tiny_base, tmp_path / "adapter", task_type="CAUSAL_LM")
    for kind in (AutoPeftModel, peftcore.AutoPeftModelForSeq2SeqLM):
        with pytest.raises(ConfigError, match=r"task_type CAUSAL_LM; use AutoPeftModelForCausalLM"):
            kind.from_pretrained(adapter)
    with pytest.raises(OSError, match=r"call AutoPeftModel\.from_pretrained"):
        AutoPeftModel()


def test_each_class_has_hf_pefts_task_and_loader() -> None:
    for kind in auto._CLASSES:
        theirs = getattr(peft, kind.__name__)
        assert theirs._target_class.__name__ == kind.model_class
        assert (
            peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[f"{kind.task_type and kind.task_type.value}"]
            is theirs._target_peft_class
        )
    assert len(auto._CLASSES) == 6
    assert auto.get_default_import_allowlist() == peft.auto.get_default_import_allowlist()


def test_an_adapter_of_the_hub_with_its_tokenizer(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(tiny_base, tmp_path / "adapter", task_type="CAUSAL_LM")
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    with HubServer().running() as server:
        use(server, tmp_path / "cache", monkeypatch)
        server.add("user/adapter", adapter, "v1")
        model = AutoPeftModelForCausalLM.from_pretrained("user/adapter", revision="v1", token=server.token)
        assert len(model.get_input_embeddings().weight) == len(tokenizer)
        torch.testing.assert_close(logits(model)[..., : expected.shape[-1]], expected)
        downloaded = {"revision": "v1", "cache_dir": tmp_path / "downloaded"}
        snapshot_download("user/adapter", token=server.token, **downloaded)
        server.requests.clear()
        model = AutoPeftModelForCausalLM.from_pretrained("user/adapter", local_files_only=True, **downloaded)
    assert len(model.get_input_embeddings().weight) == len(tokenizer) and server.requests == []
