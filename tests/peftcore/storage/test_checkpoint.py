"""Adapter directories that are damaged, foreign or not whole, and names that would corrupt them."""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel as HfPeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcore.files import damaged_files, directory_written_atomically, write_manifest


def net(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"])).save_pretrained(tmp_path)
    return tmp_path


def refused(directory: Path, message: str, model: nn.Module | None = None) -> None:
    model = model or net()
    modules = dict(model.named_modules())
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(model, directory)
    assert dict(model.named_modules()) == modules


def test_the_card_of_a_model_without_a_configuration_names_no_base(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], base_model_name_or_path="somewhere")
    get_peft_model(net(), config).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_truncated_file(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    refused(saved, "SHA256SUMS")
    (saved / "SHA256SUMS").unlink()
    refused(saved, "damaged or truncated")


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_flipped_bit(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(saved, r"adapter_model\.safetensors does not match SHA256SUMS")


@pytest.mark.faults("pickle or foreign files")
def test_a_directory_of_pickles_is_refused_before_anything_is_read(saved: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    (saved / "adapter_config.json").write_text("no JSON")  # would be said first, were it read
    refused(saved, "no adapter_model.safetensors but adapter_model.bin.*can run code")


@pytest.mark.faults("pickle or foreign files")
@pytest.mark.parametrize("name", ["optimizer.bin", "adapter_model.bin", "extra.pkl"])
def test_pickles_beside_the_weights_are_warned_of_and_not_read(name: str, saved: Path) -> None:
    """accelerate's `save_state` puts its `optimizer.bin` beside an adapter."""
    (saved / name).write_bytes(b"cposix\nmkdir\n(S'ran'\ntR.")
    with pytest.warns(UserWarning, match=f"holds {name} beside .*not read"):
        PeftModel.from_pretrained(net(), saved)
    assert not Path("ran").exists()


def test_an_edited_configuration_is_warned_of(saved: Path) -> None:
    config = saved / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/elsewhere"}))
    with pytest.warns(UserWarning, match=r"adapter_config.json does not match SHA256SUMS: it was edited"):
        loaded = PeftModel.from_pretrained(net(), saved)
    assert loaded.peft_config["default"].base_model_name_or_path == "/elsewhere"


def test_files_that_no_adapter_is_read_from_are_warned_of(saved: Path) -> None:
    write_manifest(saved)  # of all files, as a Trainer's checkpoint and a conversion have it
    (saved / "README.md").write_text("my own words")
    with pytest.warns(UserWarning, match=r"README.md does not match SHA256SUMS"):
        PeftModel.from_pretrained(net(), saved)


@pytest.mark.filterwarnings("ignore::UserWarning:peft\\.")
def test_what_peft_saved_over_ours_is_loaded(saved: Path) -> None:
    theirs = HfPeftModel.from_pretrained(net(), str(saved), is_trainable=True)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(float("lora_B" in name))
    theirs.save_pretrained(str(saved))
    with pytest.warns(UserWarning, match="another program has saved here"):
        ours = PeftModel.from_pretrained(net(), saved)
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    ours.save_pretrained(saved)
    PeftModel.from_pretrained(net(), saved)  # the manifest is right again


def test_another_base(saved: Path) -> None:
    refused(saved, r"another base model: .*lora_A.weight is \[2, 6\], here \[2, 9\]", net(9))


def test_missing_and_unexpected_keys_are_named(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.7.lora_A.weight"] = tensors.pop("base_model.model.0.lora_A.weight")
    save_file(tensors, weights)
    (saved / "SHA256SUMS").unlink()
    refused(saved, r"missing base_model\.model\.0\.lora_A\.weight.*unexpected base_model\.model\.7")


def test_absent_directory_and_absent_weights(tmp_path: Path, saved: Path) -> None:
    refused(tmp_path / "nowhere", "no adapter_config")
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, "the adapter is incomplete")


@pytest.mark.parametrize(
    "step", ["storage.checkpoint.save_file", "storage.checkpoint.manifest_text", "files.flush_to_disk"]
)
def test_a_failed_save_leaves_the_old_adapter_whole(step: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"peftcore.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def killed_at(step: int, directory: Path, do: Callable[[], object]) -> bool:
    """Run in a process of its own that ends without warning at one of its calls to the file system below a directory;
    False if it has fewer of them."""
    child = os.fork()
    if not child:
        calls = iter(range(step))

        def count(event: str, arguments: Any) -> None:
            if event in FILE_SYSTEM and str(directory) in str(arguments) and next(calls, None) is None:
                os._exit(9)

        sys.addaudithook(count)
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.fixture
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the flushes to the disk, which a killed process's files do not need."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


FILE_SYSTEM = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")


@pytest.mark.usefixtures("no_power_cut")
@pytest.mark.parametrize(
    "links", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with hard links", "without"]
)
def test_killed_at_any_step_of_a_save_one_whole_adapter_loads(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def none(*_: Any) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", none)
    x = torch.randn(3, 6)
    old = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    new = get_peft_model(net(), LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False))
    outcomes = []
    for step in itertools.count():
        directory = tmp_path / str(step)
        old.save_pretrained(directory)
        (directory / "notes.txt").write_text("mine")
        finished = not killed_at(step, tmp_path, lambda directory=directory: new.save_pretrained(directory))
        loaded = PeftModel.from_pretrained(net(), directory)(x)
        outcomes.append(torch.equal(loaded, new(x)))
        assert outcomes[-1] or torch.equal(loaded, old(x))
        assert (directory / "notes.txt").read_text() == "mine"
        if finished:
            break
        old.save_pretrained(directory)  # goes on from whatever is there
        assert torch.equal(PeftModel.from_pretrained(net(), directory)(x), old(x))
        assert damaged_files(directory) == [] and not (directory / ".saved").exists()
    assert outcomes == sorted(outcomes) and outcomes.count(False) > 3 and outcomes.count(True) > 3


@pytest.mark.usefixtures("no_power_cut")
def test_a_killed_save_that_was_killed_again_while_it_was_finished(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    models = [get_peft_model(net(), LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)) for r in (2, 3, 4)]
    models[0].save_pretrained(tmp_path)
    for step in itertools.count(8):
        model = models[1 + step % 2]
        again = killed_at(step, tmp_path, lambda model=model: model.save_pretrained(tmp_path))
        loaded = PeftModel.from_pretrained(net(), tmp_path)(x)
        assert any(torch.equal(loaded, each(x)) for each in models)
        if not again:
            assert torch.equal(loaded, model(x))
            break


@pytest.mark.usefixtures("no_power_cut")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems swap directories in two steps")
def test_killed_at_any_step_a_whole_directory_is_there(tmp_path: Path) -> None:
    def write(path: Path, text: str) -> None:
        with directory_written_atomically(path) as fresh:
            (fresh / "one").write_text(text)
            (fresh / "two").write_text(text)

    outcomes = []
    for step in itertools.count():
        path = tmp_path / str(step)
        write(path, "old")
        finished = not killed_at(step, tmp_path, lambda path=path: write(path, "new"))
        outcomes.append((path / "one").read_text())
        assert (path / "two").read_text() == outcomes[-1]
        if finished:
            break
    assert outcomes == sorted(outcomes, reverse=True) and {*outcomes} == {"old", "new"}


def test_a_prompts_encoder_goes_with_its_prompt(tmp_path: Path) -> None:
    """An adapter without one is saved over a prompt with one; a kill leaves no part of the other behind."""
    (tmp_path / "prompt_encoder.safetensors").write_bytes(b"of an earlier adapter")
    get_peft_model(net(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()


# -- options of save_pretrained ----------------------------------------------------------------------------------------


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "here", is_main_process=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"safe_serialization": False}, ConfigError, "safe_serialization must be True"),
        ({"safe_serialization": ["default"]}, ConfigError, "selected_adapters="),
        ({"path_initial_model_for_weight_conversion": "/no/x"}, CheckpointError, "/no/x"),
        ({"push_to_hub": True}, ConfigError, "push_to_hub is a method of its own"),
        ({"variant": "fp16"}, ConfigError, "variant='fp16' is not supported"),
        ({"save_embedding_layer": True}, TypeError, "no option 'save_embedding_layer'"),
        ({"selected_adapters": ["none"]}, AdapterNameError, "none"),
    ],
)
def test_an_option_is_honoured_or_refused(
    options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(error, match=said):
        model.save_pretrained(tmp_path, **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_shard_size": "1MB"}, "saved as one file"), ({"save_function": torch.save}, "save_function is not called")],
)
def test_options_of_libraries_that_have_no_effect_warn(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match=said):
        model.save_pretrained(tmp_path, **options)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_given_state_dictionary_is_what_is_saved(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    one, other = get_peft_model(net(), config), get_peft_model(net(), config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    one.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    other.save_pretrained(tmp_path / "own")
    given, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("given", "own"))
    assert given.keys() == own.keys() and all(torch.equal(given[key], own[key]) for key in own)
    short = {key: tensor for key, tensor in other.state_dict().items() if "lora_A" not in key}
    with pytest.raises(CheckpointError, match=r"state_dict lacks .*lora_A.* \(1 of 4"):
        one.save_pretrained(tmp_path / "short", state_dict=short)
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("name", ["layers", "0", "keys", "type", "lora_A", "o"])
def test_any_word_is_a_name(name: str, tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), adapter_name=name)
    model.add_adapter("another", LoraConfig(r=3, target_modules=["1"]))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / name / "adapter_model.safetensors").keys()
    assert sorted(keys) == ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    loaded = PeftModel.from_pretrained(net(), tmp_path / name, adapter_name=name)
    x = torch.randn(2, 6)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["a.b", "", "../up", "a/b"])
def test_names_that_cannot_be_paths(name: str) -> None:
    with pytest.raises(AdapterNameError, match="must not be empty"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), net(), name)


def test_disk_format(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["peft_type"] == "LORA"
    assert {f.name for f in saved.iterdir()} == {
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def test_base_weights_of_a_targeted_embedding_are_read(tmp_path: Path) -> None:
    """PEFT writes the base's embedding beside its adapter."""
    model = nn.Sequential(nn.Embedding(9, 6))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.0.base_layer.weight": torch.zeros(9, 6)}, weights)
    (tmp_path / "SHA256SUMS").unlink()
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Embedding(9, 6)), tmp_path)
    assert torch.equal(loaded(torch.arange(9)), torch.zeros(9, 6))


@pytest.mark.parametrize("library", [peftcore, peft])
def test_a_subclass_of_a_configuration_writes_its_own_file(library: Any, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Own(library.LoraConfig):
        ratio: float = 1.0

        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
            fields = dataclasses.asdict(self)
            (Path(save_directory) / "ratio.json").write_text(str(fields.pop("ratio")), encoding="utf-8")
            library.LoraConfig(**fields).save_pretrained(save_directory, **kwargs)

    library.get_peft_model(net(), Own(r=2, target_modules=["0"], ratio=4.0)).save_pretrained(tmp_path)
    assert (tmp_path / "ratio.json").read_text(encoding="utf-8") == "4.0"
    assert "ratio" not in json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert PeftModel.from_pretrained(net(), tmp_path).peft_config["default"].r == 2
