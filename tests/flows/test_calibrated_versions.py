"""Registered versions that were each trained on a calibrated base of their own: judged, served, continued, exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import peftcore
from transformers import AutoModelForCausalLM

from flows.base.calibrated import calibrated_identity
from flows.base.model import load_calibrated, load_for_evaluation
from flows.data.rows import read_rows
from flows.errors import BaseModelError, RegistryError
from flows.evaluation.scoring import row_losses
from flows.gate import reevaluation
from flows.gate.candidate import Reevaluation
from flows.gate.promote import promote
from flows.params import load_params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.registry.registered_files import files_of
from flows.runtime.project import dvc
from flows.serving.adapters_folder import register_adapters
from flows.serving.chat import adapter_models, project_models
from flows.serving.served_base import load_evaluated_base
from flows.stages import calibrate, evaluate, prepare, register, start, train
from flows.stages.reevaluate import measure
from peftcore import PeftModel
from peftcore.files import read_manifest
from peftcore.routing import AdapterStore

pytestmark = pytest.mark.slow
PARAMS = """\
project: {name: docstrings}
data: {source: rows.jsonl, group_column: book, test_rows: 12, test_share: 0.3, validation_share: 0.15}
method: {r: 2, lora_alpha: 4}
quantization: {storage: int8, calibration: {method: rounding}}
train: {batch_size: 4, gradient_accumulation: 1, learning_rate: 0.01, evaluations: 1, max_steps: 3}
evaluate: {rows: 10, batch_size: 4, generate_rows: 2, max_new_tokens: 4, samples: 1, latency_rows: 0}
register: {remote: local}
gate:
  min_loss_gain: -10
  min_rouge_l_gain: -1
  min_eos_rate: 0
  champion: {max_loss_regression_on_its_rows: 9.0, max_loss_regression: 9.0}
  slices: {max_loss_regression: 9.0}
tracking: {mode: disabled}
"""


@pytest.fixture(scope="module")
def registered(
    template: Path, tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Callable[[Path], Path]
) -> Path:
    """A repository whose v0.1.0 is champion and whose last run registered v0.2.0, of other rows."""
    parent = tmp_path_factory.mktemp("calibrated")
    root = shutil.copytree(template, parent / "project", symlinks=True)
    outs = "artifacts/data, artifacts/base, artifacts/calibrated,"
    (root / "dvc.yaml").write_text((root / "dvc.yaml").read_text().replace("artifacts/data,", outs, 1))
    (root / "params.yaml").write_text(PARAMS)
    params, run = load_params(root / "params.yaml"), Paths(parent / "run")
    write_tiny_base(run.base)
    for numbers in (range(0, 60), range(30, 90)):
        rows = [
            {"prompt": f"How much is {n} and 1?", "completion": f"{n + 1}.", "book": f"book{n // 4}"} for n in numbers
        ]
        (run.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for stage in (prepare, calibrate, train, evaluate):
            stage.run(params, run)
        for name in ("adapter", "base", "calibrated", "data", "evaluation"):
            shutil.rmtree(root / "source" / name, ignore_errors=True)
            shutil.copytree(run.artifacts / name, root / "source" / name)
        dvc(root, "repro", "--quiet", "make")
        register.run(params, Paths(root))
        if numbers.start == 0:
            assert promote(params, Paths(root)).outcome == "promoted"
    return root


@pytest.fixture
def versions(registered: Path, tmp_path: Path) -> Paths:
    """A copy of `registered` of one's own."""
    return Paths(Path(shutil.copytree(registered, tmp_path / "project", symlinks=True)))


def weight_of(model: Any) -> torch.Tensor:
    return model.get_submodule("model.layers.0.mlp.down_proj").weight.float()


def test_the_record_names_the_calibrated_base_and_dvc_keeps_it(versions: Paths) -> None:
    params = load_params(versions.params)
    registry = registry_of(params, versions.root)
    one, two = (registry.record(version) for version in registry.versions())
    assert two["calibrated_base"] == calibrated_identity(versions.calibrated) != one["calibrated_base"]
    assert one["base_model"] == two["base_model"] and one["dvc"]["artifacts/calibrated"].endswith(".dir")
    with files_of(versions, registry, registry.versions()[0], [versions.calibrated]) as at:
        assert calibrated_identity(at.calibrated) == one["calibrated_base"]


def test_the_gate_measures_the_champion_on_its_own_base(versions: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    params, measured = load_params(versions.params), list[Reevaluation]()

    def noted(*arguments: Any) -> Reevaluation:
        measured.append(reevaluation.reevaluate_champion(*arguments))
        return measured[-1]

    monkeypatch.setattr(reevaluation, "_run", measure)  # in this process, which has imported everything
    monkeypatch.setattr("flows.gate.promote.reevaluate_champion", noted)
    promotion = promote(params, versions, dry_run=True)
    assert promotion.outcome == "would promote", promotion.sentence
    registry = registry_of(params, versions.root)
    with files_of(versions, registry, registry.version("v0.1.0"), [versions.calibrated, versions.adapter]) as at:
        model = PeftModel.from_pretrained(load_for_evaluation(at.calibrated, params.quantization), at.adapter)
        rows = read_rows(versions.split("test"), limit=params.evaluate.rows)
        losses = row_losses(model, rows, 0, params.evaluate.batch_size).means
    expected = dict(zip([row["id"] for row in rows], losses, strict=True))
    columns = (measured[0].rows.column(name).to_pylist() for name in ("id", "adapter_loss"))
    found = dict(zip(*columns, strict=True))
    assert found and found == {name: pytest.approx(expected[name], abs=1e-6) for name in found}


def test_a_server_and_a_chat_load_the_champions_base_from_the_cache(versions: Paths) -> None:
    params = load_params(versions.params)
    registry = registry_of(params, versions.root)
    model, _, base = load_evaluated_base(versions.base, versions, registry, params)
    assert base.calibrated == registry.record(registry.version("v0.1.0"))["calibrated_base"]
    assert base.calibrated != calibrated_identity(versions.calibrated), "the last run's is that of v0.2.0"
    with files_of(versions, registry, registry.version("v0.1.0"), [versions.calibrated]) as at:
        assert torch.equal(weight_of(model), weight_of(load_calibrated(at.calibrated)))
    with project_models(versions, params, versions.base) as (_, _, store, _, add):
        assert add("champion") == "v0.1.0" and store.names() == ["v0.1.0"]
        with pytest.raises(
            BaseModelError, match=r"v0\.2\.0 was evaluated on base .* calibrated .* this chat has loaded base"
        ):
            add("v0.2.0")


def test_a_damaged_calibrated_base_in_the_cache_is_refused(versions: Paths) -> None:
    params = load_params(versions.params)
    registry = registry_of(params, versions.root)
    size = (versions.calibrated / "model.safetensors").stat().st_size
    for path in [*(versions.root / ".dvc" / "cache").rglob("*"), *(versions.root / ".dvc-remote").rglob("*")]:
        if path.is_file() and path.stat().st_size == size:
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RegistryError, match=r"artifacts/calibrated of .*v0\.1\.0 differs from the registered file"):
        load_evaluated_base(versions.base, versions, registry, params)


def test_training_that_continues_a_version_gets_its_base(versions: Paths) -> None:
    params = load_params(versions.params)
    params = params.model_copy(update={"train": params.train.model_copy(update={"start_from": "v0.1.0"})})
    start.run(params, versions)
    first = calibrated_identity(versions.start_calibrated)
    registry = registry_of(params, versions.root)
    assert first == registry.record(registry.version("v0.1.0"))["calibrated_base"]
    calibrate.run(params, versions)
    assert read_manifest(versions.calibrated) == read_manifest(versions.start_calibrated)


def test_exports_and_merges_are_of_the_calibrated_base(
    versions: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(versions.root)
    done = peftcore("merge", str(tmp_path / "merged"))
    assert done.exit_code == 0, done.stderr
    adapted: Any = PeftModel.from_pretrained(load_calibrated(versions.calibrated), versions.adapter)
    expected = adapted.merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    torch.testing.assert_close(weight_of(merged), weight_of(expected), rtol=0.01, atol=1e-3)
    refused = peftcore("merge", str(tmp_path / "no"), "--storage", "nf4")
    assert refused.exit_code == 2 and "is a calibrated base, whose weights are quantised already" in refused.stderr
    for form in ("gguf-merged", "gguf-lora", "vllm"):
        done = peftcore("export", form, str(tmp_path / form))
        assert done.exit_code == 0, done.stderr
    refused = peftcore("export", "gguf-merged", str(tmp_path / "no"), "--base", str(versions.base))
    assert refused.exit_code == 1 and "and this base has no calibration; give the folder" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_given_folder_is_served_dequantised_and_its_adapters_are_checked(versions: Paths, tmp_path: Path) -> None:
    with adapter_models(versions.adapter, versions.calibrated) as (model, _, store, _, add):
        assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear
        assert add("adapter") == "adapter" and store.names() == ["adapter"]
        shutil.copytree(versions.adapter, tmp_path / "adapters" / "sums")
        other = AdapterStore(load_calibrated(versions.calibrated))
        assert register_adapters(other, tmp_path / "adapters", calibrated_identity(versions.calibrated)) == ["sums"]
        with pytest.raises(BaseModelError, match="sums was trained on the calibrated base"):
            register_adapters(other, tmp_path / "adapters")
    with (
        pytest.raises(BaseModelError, match="and this base has no calibration"),
        adapter_models(versions.adapter, versions.base),
    ):
        raise AssertionError("unreachable")
