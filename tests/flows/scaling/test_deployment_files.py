"""prefect.yaml, its automation and its templates are what Prefect and its workers read, and name what there is."""

import importlib
import inspect
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.automations import AutomationCore
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[3]
FILE: dict[str, Any] = YAML(typ="safe").load(ROOT / "prefect.yaml")
TEMPLATES = {name: json.loads((ROOT / "deployment" / f"{name}.json").read_text()) for name in ("docker", "kubernetes")}
DEPLOYMENTS = {one["name"]: one for one in FILE["deployments"]}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_names_a_flow_and_its_parameters(name: str) -> None:
    path, function = DEPLOYMENTS[name]["entrypoint"].split(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
    assert set(DEPLOYMENTS[name]["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    assert DEPLOYMENTS[name]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    assert DEPLOYMENTS[name]["work_pool"]["name"] == "{{ $PEFTCORE_POOL }}"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_pushes_to_the_remote_that_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCORE_PUSH_TO", "origin")
    assert apply_values(DEPLOYMENTS[name]["parameters"], {})["push_to"] == "origin"
    monkeypatch.delenv("PEFTCORE_PUSH_TO")
    assert not apply_values(DEPLOYMENTS[name]["parameters"], {})["push_to"], "the flows take an empty one for none"


def test_only_the_retraining_comes_by_itself_once_a_week() -> None:
    assert [name for name, one in DEPLOYMENTS.items() if "schedules" in one] == ["weekly"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", DEPLOYMENTS["weekly"]["schedules"][0]["cron"])


def test_the_automation_waits_for_more_than_one_heartbeat() -> None:
    (automation,) = YAML(typ="safe").load(ROOT / "deployment" / "automations.yaml")["automations"]
    AutomationCore.model_validate(automation)
    (deployed,) = {
        one["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for one in DEPLOYMENTS.values()
    }
    assert automation["trigger"]["within"] >= 2 * int(deployed)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["several-machines", "containers"])
def test_the_guides_give_prefect_options_that_it_has(page: str) -> None:
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    commands = re.findall(r"^prefect ([a-z-]+) (?:([a-z-]+) )?(.*)$", text, re.MULTILINE)
    assert commands
    for group, command, rest in commands:
        prefect = [sys.executable, "-m", "prefect", group, *([command] if command else []), "--help"]
        done = subprocess.run(prefect, capture_output=True, text=True, check=True)
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in done.stdout, f"prefect {group} {command} has no {option}"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_uses_the_variables_that_it_has(kind: str) -> None:
    template = TEMPLATES[kind]
    WorkPoolCreate(name="pool", type=kind, base_job_template=template)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize(
    ("kind", "module", "job"),
    [
        ("docker", "prefect_docker.worker", "DockerWorkerJobConfiguration"),
        ("kubernetes", "prefect_kubernetes.worker", "KubernetesWorkerJobConfiguration"),
    ],
)
def test_a_worker_reads_its_template(kind: str, module: str, job: str) -> None:
    worker = pytest.importorskip(module, reason=f"needs `pip install prefect-{kind}`")
    properties = TEMPLATES[kind]["variables"]["properties"]
    values = {name: one["default"] for name, one in properties.items() if "default" in one}
    values |= FILE["definitions"]["pool"]["job_variables"]
    made = getattr(worker, job).model_validate(apply_values(TEMPLATES[kind]["job_configuration"], values))
    made.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="run"))
    assert "PREFECT_TASKS_DEFAULT_RETRIES" in json.dumps(made.model_dump(mode="json"))
