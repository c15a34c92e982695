"""A registered adapter is fetched once, and checked before anything of it reaches the model."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.errors import CheckpointError
from peftcore.files import MANIFEST
from peftcore.files.tensors import WEIGHTS_NAME
from peftcore.routing.entries import Entry


def saved(folder: Path, base: str | None = "the-base", **options: Any) -> Path:
    """A directory with a LoRA of one layer."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], base_model_name_or_path=base, **options)
    get_peft_model(nn.Sequential(nn.Linear(6, 6)), config).save_pretrained(folder)
    return folder


def test_a_source_is_a_directory_or_a_function_that_fetches_one(tmp_path: Path) -> None:
    saved(tmp_path)
    for source in (tmp_path, str(tmp_path), lambda: tmp_path):
        entry = Entry("a", source, ())
        assert entry.directory is None and entry.fetch() == tmp_path == entry.directory


def test_threads_that_need_one_adapter_fetch_it_once(tmp_path: Path) -> None:
    calls: list[int] = []
    fetching, go_on = threading.Event(), threading.Event()

    def fetch() -> Path:
        calls.append(1)
        fetching.set()
        go_on.wait(30)
        return tmp_path

    entry, found = Entry("a", fetch, ()), []
    threads = [threading.Thread(target=lambda: found.append(entry.fetch())) for _ in range(3)]
    threads[0].start()
    fetching.wait(30)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [tmp_path] * 3 and calls == [1]


def test_a_fetch_that_failed_is_tried_again(tmp_path: Path) -> None:
    answers = iter([OSError("no connection"), tmp_path])

    def fetch() -> Path:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    entry = Entry("a", fetch, ())
    with pytest.raises(OSError, match="no connection"):
        entry.fetch()
    assert entry.fetch() == tmp_path


def test_reading_gives_the_configuration_and_the_tensors(tmp_path: Path) -> None:
    saved(tmp_path, init_lora_weights=False)
    config, tensors = Entry("a", tmp_path, ()).read("the-base")
    assert (config.peft_type, config.r) == ("LORA", 2)  # type: ignore[attr-defined]
    expected = load_file(tmp_path / WEIGHTS_NAME)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("base", ["another", None])
def test_an_adapter_of_another_base_is_refused(base: str | None, tmp_path: Path) -> None:
    entry = Entry("a", saved(tmp_path, base), ())
    with pytest.raises(CheckpointError, match=f"was trained on {base!r}, and this store is for 'the-base'"):
        entry.read("the-base")
    entry.read(None)  # a store for any base


def test_an_adapter_that_changes_the_base_for_all_others_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "loftq", init_lora_weights="loftq")
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    deeper = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    get_peft_model(llama, deeper).save_pretrained(tmp_path / "deeper")
    for name, said in (("loftq", "replaces the base's weights"), ("deeper", "makes the base deeper")):
        with pytest.raises(CheckpointError, match=f"{said}.*, which would affect every other adapter"):
            Entry(name, tmp_path / name, ()).read(None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_its_key(value: float, tmp_path: Path) -> None:
    weights = saved(tmp_path) / WEIGHTS_NAME
    tensors = load_file(weights)
    tensors["base_model.model.0.lora_B.weight"][3, 1] = value
    save_file(tensors, weights)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"base_model\.model\.0\.lora_B\.weight is not finite"):
        Entry("a", tmp_path, ()).read(None)


def test_the_manifest_is_checked_until_the_first_successful_load(tmp_path: Path) -> None:
    """A hash of each file would slow down every later load; afterwards only the values are checked."""
    weights = saved(tmp_path) / WEIGHTS_NAME
    entry = Entry("a", tmp_path, ())
    config, tensors = entry.read(None)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, weights)
    with pytest.raises(CheckpointError, match=f"does not match {MANIFEST}"):
        entry.read(None)
    entry.config = config
    assert all(torch.equal(tensor, tensors[key] + 1) for key, tensor in entry.read(None)[1].items())
