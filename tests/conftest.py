"""A tiny tokenizer with a real chat template, and a tiny model that goes with it: whole stages in milliseconds."""

import gc
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peftcore.files import write_manifest

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


NAMED_MARKS = ("slow", "proof")
"""Marks that stand in the text of each file that has tests with them."""
MANY_MODULES = 20
MANY_TESTS = 200
_modules_at_freeze = _tests_since_freeze = 0


LONGEST_SLOW_FILES = (
    "flows/test_end_to_end.py",
    "flows/commands/test_project.py",
    "flows/stages/test_train_processes.py",
    "flows/retraining/test_flow.py",
    "peftcore/test_learning.py",
    "flows/pipeline/test_flow.py",
    "flows/gate/test_ci.py",
    "flows/gate/test_reevaluation.py",
    "flows/retraining/test_schedule.py",
    "test_packaging.py",
    "peftcore/train/test_trl_by_alias.py",
    "peftcore/hf_peft/test_transformers_by_alias.py",
)
"""Test files of `make slow` that take longest, below tests/. A file that began last would run alone at the end."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Let `make slow` and `make proof` import only files that name their mark: importing all takes half a minute."""
    mark = config.option.markexpr
    if mark not in NAMED_MARKS or collection_path.suffix != ".py":
        return None
    return None if f"mark.{mark}" in collection_path.read_text(encoding="utf-8") else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files of `make slow` first; check that a file names the marks that its tests have."""
    for mark in NAMED_MARKS:
        for path in {item.path for item in items if item.get_closest_marker(mark)}:
            assert f"mark.{mark}" in path.read_text(encoding="utf-8"), f"{path}: make {mark} would not find mark.{mark}"
    if config.option.markexpr == "slow":
        folder = Path(__file__).parent
        ranks = {folder / name: rank for rank, name in enumerate(LONGEST_SLOW_FILES)}
        assert all(path.exists() for path in ranks), "a file of LONGEST_SLOW_FILES was moved"
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_configure() -> None:
    """Seed no device that is not there: `torch.manual_seed` notes a traceback for each, which takes its time."""
    devices: tuple[Any, ...] = (torch.cuda, torch.xpu, torch.mtia)
    for device in devices:
        if not device.is_available():
            device.manual_seed_all = lambda seed: None


def pytest_collection_finish() -> None:
    """Exempt all that the imports have made from garbage collection.

    A full collection looks at every object that is not exempt. accelerate runs one at the end of each training.
    """
    _freeze()
    youngest, middle, _ = gc.get_threshold()
    gc.set_threshold(youngest, middle, 100)  # full collections, a tenth of the time of small tests, are rarer


def pytest_unconfigure() -> None:
    """Let the end of Python collect all; otherwise Triton, of PyTorch's builds for GPUs, prints what it finds."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Seed the random generators by the test's name, so that no test before it changes what it draws.

    Afterwards exempt all objects from garbage collection if the test imported many modules, as transformers and DVC do
    when they are used, or if many tests have run, because pytest and the libraries keep objects of each test.
    """
    global _tests_since_freeze
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    result = yield
    _tests_since_freeze += 1
    if len(sys.modules) >= _modules_at_freeze + MANY_MODULES or _tests_since_freeze >= MANY_TESTS:
        _freeze()
    return result


def _freeze() -> None:
    global _modules_at_freeze, _tests_since_freeze
    gc.collect()
    gc.freeze()
    _modules_at_freeze, _tests_since_freeze = len(sys.modules), 0


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, ChatML; pads with its end of turn, as SmolLM2 does where it is published."""
    return _tokenizer()


def _tokenizer() -> PreTrainedTokenizerBase:
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=1024,
    )


@pytest.fixture
def tiny_base(tmp_path: Path, write_tiny_base: Callable[[Path], Path]) -> Path:
    """A folder as the fetch stage leaves it, at artifacts/base below `tmp_path`: a two-layer Llama, its tokenizer."""
    return write_tiny_base(tmp_path / "artifacts" / "base")


@pytest.fixture(scope="session")
def write_tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """What `tiny_base` is written with, for fixtures of a wider scope: a copy of a folder that is made once."""
    original = tmp_path_factory.mktemp("base") / "base"

    def write(folder: Path) -> Path:
        if not original.exists():
            _write_tiny_base(original)
        torch.manual_seed(0)  # what a test draws does not depend on the tests before it
        return shutil.copytree(original, folder, dirs_exist_ok=True)

    return write


def _write_tiny_base(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder)
    return folder
