"""The files of a teacher: the start stage's version, and another model with the base's tokens."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.training.teacher_files import check_teacher, load_other_model

IDS = torch.tensor([[3, 7, 9, 4]])


def test_only_the_version_that_the_start_stage_wrote_is_a_teacher(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    params = Params.model_validate({"train": {"distillation": {"teacher": "v0.4.0"}}})
    with pytest.raises(StageError, match=r"teacher is v0\.4\.0, and .* has none; run `peftcore stage start`"):
        check_teacher(params, paths)
    paths.start.mkdir(parents=True)
    paths.teacher_source.write_text('{"version": "v0.3.0"}')
    with pytest.raises(StageError, match=r"teacher is v0\.4\.0, and .* has v0\.3\.0"):
        check_teacher(params, paths)
    paths.teacher_source.write_text('{"version": "v0.4.0"}')
    check_teacher(params, paths)


def test_another_model_needs_the_same_tokens(tmp_path: Path, write_tiny_base: Callable[[Path], Path]) -> None:
    paths = Paths(tmp_path)
    write_tiny_base(paths.base)
    shutil.copytree(paths.base, tmp_path / "large")
    expected = AutoModelForCausalLM.from_pretrained(paths.base, dtype=torch.bfloat16)
    assert torch.equal(load_other_model("path:large", paths)(IDS).logits, expected(IDS).logits)
    with pytest.raises(StageError, match=r"train\.distillation\.teacher path:absent: there is no .*config\.json"):
        load_other_model("path:absent", paths)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "large")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "large")
    with pytest.raises(StageError, match=r"its tokenizer differs from the base's in 1 entries"):
        load_other_model("path:large", paths)


@pytest.mark.slow
def test_a_teacher_on_the_hub(
    tmp_path: Path, write_tiny_base: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, hub = Paths(tmp_path), HubServer()
    write_tiny_base(paths.base)
    hub.add("org/large", paths.base)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    expected = AutoModelForCausalLM.from_pretrained(paths.base, dtype=torch.bfloat16)(IDS).logits
    with hub.running():
        assert torch.equal(load_other_model("hub:org/large", paths)(IDS).logits, expected)
        assert "model.safetensors" in hub.downloaded()
        with pytest.raises(StageError, match=r"train\.distillation\.teacher hub:org/absent"):
            load_other_model("hub:org/absent", paths)
    assert torch.equal(load_other_model("hub:org/large", paths)(IDS).logits, expected)  # from the cache
