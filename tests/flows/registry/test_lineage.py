"""The lineage record: read from the files of a run, and refused where they do not fit together."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file
from torch import nn

from flows.errors import RegistryError, StageError
from flows.paths import Paths
from flows.registry.lineage import (
    adapter_files,
    adapter_ranks,
    check_artifact_name,
    content_digest,
    data_summary,
    evidence_digests,
    headline_metrics,
    lock_text,
    read_json,
)
from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.files import sha256

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path: Path, results: Callable[..., None]) -> Paths:
    """Paths of a run whose stages before register are done."""
    paths = Paths(tmp_path)
    results(paths.artifacts)
    return paths


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_digest_of_an_adapter_is_that_of_the_list_which_sha256sum_prints(tmp_path: Path) -> None:
    names = ["README.md", "adapter_config.json", WEIGHTS]
    for name in names:
        (tmp_path / name).write_text(name)
    printed = subprocess.run(["sha256sum", *names[1:]], cwd=tmp_path, check=True, capture_output=True).stdout
    (tmp_path / "printed").write_bytes(printed)
    files = {name: sha256(tmp_path / name) for name in names}
    assert content_digest(files) == sha256(tmp_path / "printed")
    assert content_digest(dict(reversed(files.items()))) == content_digest(files), "whatever the order"
    assert content_digest(files | {"README.md": "0" * 64}) == content_digest(files), "a model card is no content"
    assert content_digest(files | {WEIGHTS: "0" * 64}) != content_digest(files)


def test_a_lock_is_written_as_yaml_in_the_order_of_its_stages() -> None:
    stages = {name: {"cmd": f"python {name}.py", "outs": [{"path": name, "md5": "0"}]} for name in ("make", "a", "b")}
    lock = {"schema": "2.0", "stages": stages}
    read = YAML(typ="safe").load(lock_text(lock))
    assert read == lock
    assert list(read["stages"]) == ["make", "a", "b"]


def test_a_file_that_is_missing_or_broken_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(StageError, match=r"metrics\.json is missing; run the stages before this one"):
        read_json(path)
    path.write_text('{"loss": ')
    with pytest.raises(StageError, match=r"metrics\.json is not valid JSON .*; remove it and run `peftcore run`"):
        read_json(path)


def test_headline_metrics_are_those_of_the_three_stages(run: Paths) -> None:
    metrics = headline_metrics(run)
    evaluation, merge, summary = (
        json.loads(path.read_text()) for path in (run.evaluation_metrics, run.merge_report, run.training_summary)
    )
    assert [metrics[name] for name in ("base", "adapter", "gain")] == [
        evaluation[name] for name in ("base", "adapter", "gain")
    ]
    assert metrics["merge"] == {"kl": merge["kl"], "top1_agreement": merge["top1_agreement"]}
    assert metrics["training"].items() <= summary.items() and metrics["training"]["steps"] == 4


def test_parts_that_an_evaluation_lacks_are_left_out(run: Paths) -> None:
    edit(run.evaluation_metrics, objective="sft", control=None, latency=None)
    metrics = headline_metrics(run)
    assert metrics["objective"] == "sft"
    assert not {"control", "latency", "loss_function"} & metrics.keys()


def test_evidence_is_each_file_that_the_gate_reads(run: Paths) -> None:
    digests = evidence_digests(run)
    assert list(digests) == [
        "artifacts/evaluation/metrics.json",
        "artifacts/evaluation/rows.parquet",
        "artifacts/evaluation/control.parquet",
        "artifacts/merge.json",
    ]
    assert all(digest == sha256(run.root / name) for name, digest in digests.items())
    run.evaluation_control.unlink()
    assert digests.keys() - evidence_digests(run).keys() == {"artifacts/evaluation/control.parquet"}


def test_data_are_told_by_their_source_and_their_rows(run: Paths) -> None:
    assert data_summary(run) == {
        "source": "stdlib:docstrings",
        "examples": 60,
        "dropped": {"longer than 320 tokens": 3},
        "rows": {"train": 40, "validation": 40, "test": 40},
    }


@pytest.mark.parametrize(
    ("declared", "there"),
    [
        ("", "none"),
        ("artifacts: {tickets: {path: artifacts/adapter, type: model}}", "tickets"),
        ("artifacts: {docstrings: {path: artifacts/merged, type: model}}", "docstrings"),
    ],
)
def test_a_name_that_dvc_does_not_have_for_the_adapter_is_refused(tmp_path: Path, declared: str, there: str) -> None:
    (tmp_path / "dvc.yaml").write_text(f"stages: {{}}\n{declared}\n")
    with pytest.raises(RegistryError, match=rf"no 'docstrings' with path artifacts/adapter \(declared: {there}\)"):
        check_artifact_name(tmp_path, "docstrings")
    (tmp_path / "dvc.yaml").write_text("artifacts: {docstrings: {path: artifacts/adapter}}\n")
    check_artifact_name(tmp_path, "docstrings")


def test_ranks_are_those_of_the_weights(tmp_path: Path) -> None:
    shapes = {"a.lora_A": (4, 9), "a.lora_B": (7, 4), "b.lora_A": (4, 9), "c.lora_A": (2, 9)}
    tensors = {f"base_model.model.{name}.weight": numpy.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors | {"base_model.model.d.lora_embedding_A": numpy.zeros((2, 5))}, tmp_path / WEIGHTS)
    assert adapter_ranks(tmp_path) == {"layers": 4, "usual": 4, "others": {"c": 2, "d": 2}}
    save_file({"base_model.model.a.vera_lambda_b": numpy.zeros(3)}, tmp_path / WEIGHTS)
    assert adapter_ranks(tmp_path) == {}
    (tmp_path / WEIGHTS).write_bytes(b"no")
    with pytest.raises(StageError, match="cannot be read"):
        adapter_ranks(tmp_path)


@pytest.mark.parametrize("edited", ["adapter_config.json", "both"])
def test_what_the_library_loads_with_a_warning_is_not_registered(edited: str, tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    assert adapter_files(tmp_path).keys() == {"adapter_config.json", "adapter_model.safetensors"}
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    if edited == "both":
        weights = tmp_path / "adapter_model.safetensors"
        save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights)
    with pytest.warns(UserWarning, match="does not match SHA256SUMS"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    with pytest.raises(StageError, match=r"adapter_config\.json.* is damaged or missing"):
        adapter_files(tmp_path)
