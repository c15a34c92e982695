"""The lineage record of a version: where it came from, and its headline metrics.

All values are read from the files of the run; nothing is computed again.
"""

import hashlib
import io
import json
import os
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from platform import machine, processor, python_version, system
from typing import Any

from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open

from flows.errors import RegistryError, RepositoryError, StageError
from flows.params import Params
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.inputs import uncommitted_files
from flows.runtime.project import changed_stages_beside
from peftcore.files import MANIFEST, damaged_files, read_manifest, sha256

LOCK = "dvc.lock"
PARTS = (
    *("objective", "loss_function", "control", "latency", "scorers", "suites", "benchmarks", "calibration"),
    *("best_of_n", "baseline"),
)
"""Optional parts of an evaluation; records of older releases lack them."""
MERGE = ("kl", "top1_agreement", "cosine")
"""Figures of the merged model in metrics.json; the cosine is that of embeddings."""
SOFTWARE = ("torch", "transformers", "bitsandbytes", "peftcore")


def read_json(path: Path) -> Any:
    """Parse one JSON file of the run. Raises StageError naming the file if it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing; run the stages before this one with `peftcore run`") from error
    except json.JSONDecodeError as error:
        raise StageError(f"{path} is not valid JSON ({error}); remove it and run `peftcore run`") from error


def check_artifact_name(root: Path, name: str) -> None:
    """Check that dvc.yaml declares `name` as the adapter, as `dvc artifacts get` needs. Raises RegistryError."""
    declared = YAML(typ="safe").load(root / "dvc.yaml").get("artifacts") or {}
    if declared.get(name, {}).get("path") != "artifacts/adapter":
        declared_names = ", ".join(declared) or "none"
        raise RegistryError(
            f"project.name is {name!r}, but `artifacts:` in dvc.yaml has no {name!r} with path artifacts/adapter "
            f"(declared: {declared_names}); rename the one or add the other"
        )


def read_lock(root: Path, without: str) -> dict[str, Any]:
    """Return this run's dvc.lock without the entry of one stage.

    Args:
        root: the repository.
        without: the stage that is running; its entry is still that of the run before.

    Raises:
        RepositoryError: the lock is missing, or is out of date for another stage.
    """
    path = root / LOCK
    if not path.exists():
        raise RepositoryError(f"{path} is missing, so the run's inputs are unknown; use `peftcore run`")
    stale = changed_stages_beside(root, without)
    if stale:
        changes = "; ".join(f"{stage} ({', '.join(what)})" for stage, what in stale.items())
        raise RepositoryError(
            f"dvc.lock does not match the files of: {changes}; something was changed since they ran, "
            "so run the whole pipeline again with `peftcore run`"
        )
    lock = YAML(typ="safe").load(path)
    lock["stages"].pop(without, None)
    return lock


def lock_text(lock: dict[str, Any]) -> str:
    """Return a dvc.lock as text."""
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    text = io.StringIO()
    yaml.dump(lock, text)
    return text.getvalue()


def adapter_files(adapter: Path) -> dict[str, str]:
    """Return {file: SHA-256} of the adapter's manifest. Raises StageError if a file does not match it."""
    files = read_manifest(adapter)
    damaged = damaged_files(adapter)
    if not files or damaged:
        problem = f"{', '.join(damaged)} is damaged or missing" if files else f"it has no {MANIFEST}"
        raise StageError(f"{adapter}: {problem}; train it again with `peftcore run`")
    return files


def content_digest(files: dict[str, str]) -> str:
    """Return one SHA-256 for a whole adapter. files: {file: SHA-256}; Markdown files do not count."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(files.items()) if not name.endswith(".md")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def headline_metrics(paths: Paths) -> dict[str, Any]:
    """Return the content of metrics.json: figures of the evaluate, merge and train stages."""
    evaluation = read_json(paths.evaluation_metrics)
    merge = read_json(paths.merge_report)
    summary = read_json(paths.training_summary)
    training = ("steps", "best_step", "best_validation_loss", "seconds", "tokens", "trainable_parameters")
    return {
        **{part: evaluation[part] for part in PARTS if evaluation.get(part) is not None},
        **{part: evaluation[part] for part in ("base", "adapter", "gain")},
        "merge": {name: merge[name] for name in MERGE if name in merge},
        "training": {name: summary[name] for name in training},
    }


def adapter_ranks(adapter: Path) -> dict[str, Any]:
    """Return the ranks of the adapted layers, from the shapes of lora_A.

    Returns:
        {"layers": number of layers, "usual": the most frequent rank, "others": {layer: rank} of the other layers};
        empty for a method without such matrices.
    """
    ranks: dict[str, int] = {}
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
                if rest.startswith(("A", "embedding_A")):
                    ranks[layer] = file.get_slice(name).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise StageError(f"{adapter} cannot be read ({error}); train it again with `peftcore run`") from error
    if not ranks:
        return {}
    usual = max(Counter(ranks.values()).items(), key=lambda pair: (pair[1], pair[0]))[0]
    others = {layer: rank for layer, rank in sorted(ranks.items()) if rank != usual}
    return {"layers": len(ranks), "usual": usual, "others": others}


def data_summary(paths: Paths) -> dict[str, Any]:
    """Return the data's source, rows of each split, {reason: number} of dropped rows, and names of classes if any."""
    report = read_json(paths.data_report)
    rows = {name: split["rows"] for name, split in report["splits"].items()}
    named = {"labels": report["labels"]} if "labels" in report else {}
    told = {key: report[key] for key in ("source", "examples", "dropped")}
    return told | {"rows": rows} | named


def this_machine() -> dict[str, Any]:
    """Return the properties of this machine that can change a result's last bits."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor())
    return {"system": system(), "architecture": machine(), "processor": named, "cores": os.cpu_count()}


def this_software() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    return {"python": python_version(), **{name: installed(name) for name in SOFTWARE}}


def evidence(paths: Paths) -> tuple[Path, ...]:
    """Return the files of the evaluation and the merge, by which a version is judged."""
    optional = [path for path in (paths.evaluation_control, paths.evaluation_suites) if path.exists()]
    return (paths.evaluation_metrics, paths.evaluation_rows, *optional, paths.merge_report)


def evidence_digests(paths: Paths) -> dict[str, str]:
    """Return {file of `evidence`, relative to the root: its SHA-256}."""
    return {path.relative_to(paths.root).as_posix(): sha256(path) for path in evidence(paths)}


def collect(params: Params, paths: Paths, git: Git, lock: dict[str, Any], number: str) -> dict[str, Any]:
    """Return the lineage record of version `number`. Digests are hexadecimal SHA-256; DVC's own are MD5."""
    evaluation, training = read_json(paths.evaluation_metrics), read_json(paths.training_summary)
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    files = adapter_files(paths.adapter)
    return {
        "name": params.project.name,
        "version": number,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": {
            "commit": git.head(),
            "uncommitted": uncommitted_files(git, excluded=(LOCK, paths.metrics.name)),
        },
        "adapter": {"content": content_digest(files), "files": files},
        "evidence": evidence_digests(paths),
        "evaluation_set": evaluation["evaluation_set"],
        "base_model": evaluation["base_model"],
        "base_manifest": evaluation.get("base_manifest"),
        **({"calibrated_base": evaluation["calibrated_base"]} if evaluation.get("calibrated_base") else {}),
        "dvc": {out["path"]: out["md5"] for out in outs if "md5" in out},
        "params": params.model_dump(),
        "metrics": headline_metrics(paths),
        "wandb_run_id": training.get("wandb_run_id"),
        **({"tracking_runs": training["tracking_runs"]} if "tracking_runs" in training else {}),
        "slices": evaluation.get("slices", {}),
        "data": data_summary(paths),
        "ranks": adapter_ranks(paths.adapter),
        "software": this_software(),
        "machine": this_machine(),
    }
