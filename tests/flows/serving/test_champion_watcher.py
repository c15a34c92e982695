"""Promotions that a server picks up while it runs."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gto_command import run_gto
from transformers import AutoModelForCausalLM, LlamaConfig

from flows.errors import BaseModelError, RegistryError
from flows.gate.promote import promote
from flows.params import Quantization
from flows.registry.registry import Registry
from flows.serving.champion_watcher import ChampionWatcher
from flows.serving.served_base import ServedBase
from peftcore import LoraConfig, get_peft_model
from peftcore.routing import AdapterStore

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "num_key_value_heads": 1, "vocab_size": 32}  # fmt: skip


class FakeStore:
    """What has been asked of a store: (verb, name, the version's folder name), and the files' weights."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.weights: list[bytes] = []

    def swap(self, name: str, directory: Path, tags: Any, check: Any) -> None:
        self.asked.append(("swap", name, directory.name))
        self.weights.append((directory / "adapter_model.safetensors").read_bytes())

    def remove(self, name: str) -> None:
        self.asked.append(("remove", name))


@pytest.fixture
def base(registered: Any) -> ServedBase:
    """The base on which the project's versions are evaluated."""
    metrics = json.loads(registered.paths.evaluation_metrics.read_text())
    return ServedBase(metrics["base_model"], registered.params.quantization)


@pytest.fixture
def followed(registered: Any, base: ServedBase, tmp_path: Path) -> tuple[ChampionWatcher, FakeStore]:
    store = FakeStore()
    return ChampionWatcher(registered.paths, "docstrings", "champion", store, base, tmp_path / "kept", 0.05), store  # type: ignore[arg-type]


def test_each_promoted_version_takes_the_place_of_the_one_before(registered: Any, followed: Any) -> None:
    project, (watch, store) = registered, followed
    version = ("refs/tags/docstrings@v0.1.0", project.git("rev-parse", "docstrings@v0.1.0").strip())
    project.git("update-ref", "-d", version[0])
    assert not watch.check()  # nothing is registered yet
    project.git("update-ref", *version)
    assert not watch.check()  # a version without the stage is none
    promote(project.params, project.paths)
    assert watch.check() and not watch.check()
    assert store.asked == [("swap", "docstrings", "v0.1.0")]

    project.register(loss=2.0, weight=2.0)
    promote(project.params, project.paths)
    with watch.running():
        until = time.monotonic() + 60
        while watch.version == "v0.1.0" and time.monotonic() < until:
            time.sleep(0.05)
    assert store.asked[1:] == [("swap", "docstrings", "v0.1.1")]
    assert store.weights[1] == (project.paths.adapter / "adapter_model.safetensors").read_bytes() != store.weights[0]


def test_files_of_the_served_version_and_the_one_before_stay_and_older_ones_go(
    registered: Any, followed: Any, tmp_path: Path
) -> None:
    project, (watch, _) = registered, followed
    for loss in (3.0, 2.0, 1.5):
        if loss < 3.0:
            project.register(loss=loss, weight=loss)
        promote(project.params, project.paths)
        assert watch.check()
    kept = {path.parent.name for path in (tmp_path / "kept").rglob("adapter_model.safetensors")}
    assert kept == {"v0.1.1", "v0.1.2"}
    for again in ("v0.1.1", "v0.1.2"):
        run_gto(project.root, "assign", "docstrings", "--version", again, "--stage", "champion", "--force")
        assert watch.check() and watch.version == again
    assert {path.parent.name for path in (tmp_path / "kept").rglob("adapter_model.safetensors")} == kept


def test_a_version_that_loses_the_stage_is_served_no_longer(registered: Any, followed: Any) -> None:
    watch, store = followed
    promote(registered.params, registered.paths)
    assert watch.check()
    run_gto(registered.root, "deprecate", "docstrings", "v0.1.0", "champion")
    assert watch.check() and not watch.check()
    assert store.asked[-1] == ("remove", "docstrings") and watch.version is None


def test_another_version_under_the_same_number_takes_the_place_too(registered: Any, followed: Any) -> None:
    """As after a fetch, where the remote has given the number to another version."""
    project, (watch, store) = registered, followed
    promote(project.params, project.paths)
    assert watch.check()
    project.git("tag", "--delete", "docstrings@v0.1.0", "docstrings#champion#1")
    project.register(weight=2.0)
    promote(project.params, project.paths)
    assert watch.check() and not watch.check() and watch.version == "v0.1.0"
    assert store.weights[1] == (project.paths.adapter / "adapter_model.safetensors").read_bytes() != store.weights[0]


@pytest.mark.parametrize("quantization", [{}, {"quantization": {"storage": "of another release"}}])
def test_a_record_of_another_storage_is_a_warning_and_the_watch_goes_on(
    registered: Any, followed: Any, monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any]
) -> None:
    watch, store = followed
    record = json.loads(registered.paths.version.read_text())
    promote(registered.params, registered.paths)
    params = {key: value for key, value in record["params"].items() if key != "quantization"} | quantization
    monkeypatch.setattr(Registry, "record", lambda *_: record | {"params": params})
    watch.check_and_warn()
    assert "does not state how its base was stored" in watch.warnings["champion"] and store.asked == []


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "0" * 64},
        {"quantization": Quantization(storage="int8")},
        {"quantization": Quantization(double_quant=False)},
    ],
    ids=["files", "storage", "double quantisation"],
)
def test_a_version_evaluated_on_another_base_is_not_served(
    registered: Any, base: ServedBase, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    store: Any = FakeStore()
    watch = ChampionWatcher(registered.paths, "docstrings", "champion", store, replace(base, **other), tmp_path)
    promote(registered.params, registered.paths)
    with pytest.raises(BaseModelError, match=r"was evaluated on base .* and this server has loaded base .* start the"):
        watch.check()
    for _ in range(2):
        watch.check_and_warn()
    assert store.asked == [] and watch.version is None
    assert "start the server again" in watch.warnings["champion"]
    assert sum(record.name == "flows.serving.champion_watcher" for record in caplog.records) == 1, "it is said once"


def test_a_version_that_does_not_load_leaves_the_old_one(registered: Any, base: ServedBase, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    store = AdapterStore(model)
    watch = ChampionWatcher(registered.paths, "docstrings", "champion", store, base, tmp_path / "kept")
    own = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    own.save_pretrained(tmp_path / "own")
    store.register("docstrings", tmp_path / "own")
    watch.version = "v0.0.9"
    promote(registered.params, registered.paths)  # its adapter is of another model
    watch.check_and_warn()
    assert watch.version == "v0.0.9" and watch.warnings["champion"]
    with store.using("docstrings") as names:
        assert list(names) == ["docstrings"]


def test_a_version_whose_files_are_damaged_is_not_served(registered: Any, followed: Any) -> None:
    project, (watch, store) = registered, followed
    promote(project.params, project.paths)
    for path in (project.root / ".dvc" / "cache").rglob("*"):
        if path.is_file() and path.read_bytes() == (project.paths.adapter / "adapter_config.json").read_bytes():
            path.chmod(0o644)
            path.write_text('{"peft_type": "LORA" }')
    with pytest.raises(RegistryError, match=r"adapter_config.json of docstrings@v0.1.0 is not what was registered"):
        watch.check()
    assert store.asked == [] and watch.version is None


def test_a_version_promoted_elsewhere_is_fetched_and_a_failing_fetch_is_a_warning(
    registered: Any, base: ServedBase, tmp_path: Path
) -> None:
    """Another machine promotes and pushes; this one has only a clone of the repository."""
    store: Any = FakeStore()
    project, remote = registered, tmp_path / "remote.git"
    project.git("clone", "--quiet", "--bare", str(project.root), str(remote))
    project.git("remote", "add", "shared", str(remote))
    promote(project.params, project.paths, push_to="shared")
    project.git("tag", "--delete", "docstrings#champion#1")  # as in a clone from before the promotion

    folder = tmp_path / "kept"
    alone = ChampionWatcher(project.paths, "docstrings", "champion", store, base, folder)
    alone.check_and_warn()
    assert alone.version is None and alone.warnings == {}
    watch = ChampionWatcher(project.paths, "docstrings", "champion", store, base, folder, remote="shared")
    watch.check_and_warn()
    assert (watch.version, watch.warnings) == ("v0.1.0", {})

    remote.rename(tmp_path / "away.git")
    watch.check_and_warn()
    assert watch.version == "v0.1.0" and "a newer version may be there" in watch.warnings["fetch"]
    (tmp_path / "away.git").rename(remote)
    watch.check_and_warn()
    assert watch.warnings == {}
