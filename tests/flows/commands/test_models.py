"""export, merge and serve outside of the pipeline: what their options come to, and JSON. Formats: test_exporting.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import peftcore
from small_adapters import trained
from transformers import AutoModelForCausalLM

from flows.base.model import load_dequantized
from flows.params import Quantization
from flows.paths import CORRECTED_STORAGE
from flows.serving.options import ServeOptions
from peftcore import LoraConfig, PeftModel


def test_a_streamed_merge(tiny_base: Path, tmp_path: Path) -> None:
    options = trained(tiny_base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    done = peftcore("merge", str(tmp_path / "out"), *options, "--dtype", "float32")
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    refused = peftcore("merge", str(tmp_path / "no"), *options, "--storage", "int3")
    assert refused.exit_code == 1 and refused.stderr.startswith("error: storage must be one of nf4, fp4")


def test_an_adapter_that_corrects_a_storage_is_merged_into_its_weights(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = trained(tiny_base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    (tmp_path / "adapter" / CORRECTED_STORAGE).write_text('{"storage": "nf4", "compute_dtype": "float32"}')
    done = peftcore("merge", str(tmp_path / "out"), *options)
    assert done.exit_code == 0, done.stderr
    base = load_dequantized(tiny_base, Quantization.model_validate({"compute_dtype": "float32"}))
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    torch.testing.assert_close(merged, expected)
    done = peftcore("export", "gguf-lora", str(tmp_path / "lora.gguf"), *options)
    assert done.exit_code == 0 and "the adapter corrects what nf4 lost" in caplog.text
    whole = ["export", "gguf-merged", str(tmp_path / "whole.gguf"), *options]
    assert peftcore(*whole).exit_code == 0
    refused = peftcore(*whole, "--gguf", str(tmp_path / "whole.gguf"))
    assert refused.exit_code == 1 and "leave --gguf out" in refused.stderr


def test_an_export_and_a_merge_tell_json(tiny_base: Path, tmp_path: Path) -> None:
    options = trained(tiny_base, LoraConfig(target_modules=["q_proj"], r=2), tmp_path / "adapter")
    told = json.loads(peftcore("export", "vllm", str(tmp_path / "vllm"), *options, "--json").stdout)
    assert (told["format"], told["path"]) == ("vllm", str(tmp_path / "vllm"))
    assert told["note"].startswith(f"{tmp_path / 'vllm'}: for vLLM and LoRAX, --max-lora-rank")
    told = json.loads(peftcore("merge", str(tmp_path / "merged"), *options, "--json").stdout)
    assert told == {"path": str(tmp_path / "merged")}


@pytest.mark.parametrize(
    "command", [["export", "onnx", "out"], ["export", "vllm"], ["merge"], ["merge", "out", "--shard-gb", "0"]]
)
def test_what_cannot_be_read_is_a_usage_error(command: list[str]) -> None:
    assert peftcore(*command).exit_code == 2


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """The options of each server that would have been started."""
    options: list[ServeOptions] = []
    monkeypatch.setattr("flows.serving.serve.serve", options.append)
    return options


def test_a_server_gets_each_option(tiny_base: Path, tmp_path: Path, served: list[ServeOptions]) -> None:
    given = {
        "--max-batch": 3,
        "--max-queue": 5,
        "--max-tokens": 7,
        "--max-loaded": 9,
        "--prefix-cache": 2,
        "--timeout": 11.5,
        "--grace": 2.5,
    }
    numbers = [word for option, value in given.items() for word in (option, str(value))]
    keys = ["--api-key", "one", "--api-key", "two", "--composition", 'mix={"a": 1}']
    base = ["--base", str(tiny_base), "--adapters", str(tmp_path), "--host", "0.0.0.0", "--port", "0", "--name", "tiny"]
    base += ["--metrics-port", "9090"]
    (tmp_path / "redact.yaml").write_text("- email\n")
    base += ["--record", str(tmp_path / "r"), "--record-mb", "2.5", "--redact", str(tmp_path / "redact.yaml")]
    done = peftcore("serve", *base, *numbers, *keys, "--dtype", "float32")
    assert done.exit_code == 0, done.stderr
    (options,) = served
    assert (options.base, options.adapters, options.dtype) == (tiny_base, tmp_path, "float32")
    assert (options.host, options.port, options.metrics_port, options.name) == ("0.0.0.0", 0, 9090, "tiny")
    limits = options.limits
    assert (limits.max_batch, limits.max_queue, limits.max_tokens, limits.prefix_cache) == (3, 5, 7, 2 << 20)
    assert (options.max_loaded, limits.timeout, limits.grace) == (9, 11.5, 2.5)
    assert (list(options.keys), list(options.mixtures)) == (["one", "two"], ['mix={"a": 1}'])
    assert options.project is None, "nothing is watched"
    assert (options.record, options.record_bytes) == (tmp_path / "r", 2_500_000)
    assert options.redact == tmp_path / "redact.yaml"


def test_redaction_without_a_record_is_a_usage_error(
    tiny_base: Path, tmp_path: Path, served: list[ServeOptions]
) -> None:
    (tmp_path / "redact.yaml").write_text("- email\n")
    refused = peftcore("serve", "--base", str(tiny_base), "--redact", str(tmp_path / "redact.yaml"))
    assert refused.exit_code == 2 and "--redact has no effect without --record" in refused.stderr
    assert served == []


def test_a_watching_server_follows_the_project_here(here: Any, served: list[ServeOptions]) -> None:
    command = ["serve", "--watch", "--watch-seconds", "0.5", "--watch-remote", "origin"]
    early = peftcore(*command)
    assert early.exit_code == 1 and "artifacts/base; run `peftcore stage fetch`" in early.stderr
    here.paths.base.mkdir()
    done = peftcore(*command)
    assert done.exit_code == 0, done.stderr
    (options,) = served
    assert options.project == (here.paths, here.params)
    assert (options.seconds, options.git_remote, options.base) == (0.5, "origin", here.paths.base)


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("--watch-remote", "origin", "--watch"),
        ("--watch-seconds", "5", "--watch"),
        ("--record-mb", "256", "--record FOLDER"),
    ],
)
def test_an_option_without_the_one_that_it_belongs_to_is_a_usage_error(
    here: Any, served: list[ServeOptions], option: str, value: str, needed: str
) -> None:
    refused = peftcore("serve", option, value)
    assert refused.exit_code == 2 and f"{option} has no effect without {needed}" in refused.stderr
    assert served == []


def test_a_server_that_records_or_watches_has_the_default_limits(here: Any, served: list[ServeOptions]) -> None:
    here.paths.base.mkdir()
    done = peftcore("serve", "--watch", "--record", str(here.root / "records"))
    assert done.exit_code == 0, done.stderr
    (options,) = served
    assert (options.seconds, options.record_bytes) == (5.0, 256_000_000)
