"""The wheel: what is in it, the library with its own dependencies alone, and the command with the extra `pipeline`."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peftcore

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
BASE = {"huggingface-hub", "numpy", "regex", "safetensors", "torch", "tqdm", "transformers"}
"""The packages that the library needs without any extra."""

IMPORT_ALL = """
import importlib, pkgutil
import peftcore

needs_extra = set()
of_bitsandbytes = "peftcore.bases.bitsandbytes_layers.linear4bit"
for package in ("peftcore.export", "peftcore.gguf_files", "peftcore.serving", "peftcore.train", of_bitsandbytes):
    try:
        importlib.import_module(package)
    except peftcore.MissingExtraError as error:
        needs_extra.add(package)
        print(error)
for module in pkgutil.walk_packages(peftcore.__path__, "peftcore.", onerror=lambda name: None):
    if not any(module.name == package or module.name.startswith(package + ".") for package in needs_extra):
        importlib.import_module(module.name)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files() -> set[str]:
    """Return what the repository has for the two packages, without their documentation."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "peftcore", "flows", cwd=ROOT)
    return {name for name in listed.splitlines() if not name.endswith(".md") and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because setuptools also packs what an earlier build left in `build/`."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *package_files()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_every_extra_is_a_part_of_the_ones_above_it() -> None:
    extras = PROJECT["optional-dependencies"]
    assert "peftcore[export,quant,serve,train]" in extras["pipeline"]
    assert "peftcore[docs,pipeline,scorers,structured]" in extras["dev"] and "peftcore[pipeline]" in extras["scale"]


def test_constraints_name_dependencies_in_versions_that_are_admitted() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {r.name: r for r in map(Requirement, (line for line in lines if not line.startswith("#")))}
    assert list(pinned) == sorted(pinned, key=str.lower)
    assert "torch" not in pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    admitted = {r.name: r.specifier for r in map(Requirement, chain(project["dependencies"], *extras))}
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert admitted[name].contains(pin.version), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"peftcore-{peftcore.__version__}.dist-info/METADATA"))
    packed = {name for name in names if not name.startswith(f"peftcore-{peftcore.__version__}.dist-info/")}
    assert packed == package_files()
    assert {"peftcore/py.typed", "flows/py.typed", "flows/review/templates/review.html"} <= packed
    assert metadata["Version"] == peftcore.__version__
    required = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    base = {re.split(r"[^\w-]", one)[0].replace("_", "-") for one in required}
    assert base == BASE


def required_packages(*names: str) -> set[str]:
    """Return these installed packages and all that they need without any extra."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [one.name for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


def link_packages(names: set[str], folder: Path) -> None:
    """Make installed packages importable from a folder, by links to their files."""
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # `nvidia` is a folder of several packages
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_library_runs_with_its_own_dependencies_alone(wheel: Path, tmp_path: Path) -> None:
    """The packages of the tests' environment are linked, not downloaded; pip checks that the wheel needs no other."""
    run(sys.executable, "-m", "venv", "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    where = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    link_packages(required_packages(*BASE), where)
    run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", str(wheel), cwd=tmp_path
    )
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example
    run(python, "-W", "error", "-c", example[1], cwd=tmp_path)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()

    told = run(python, "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert [re.sub(" needs .*; install with: ", " ", line) for line in told] == [
        "peftcore.export pip install 'peftcore[export]'",
        "peftcore.gguf_files pip install 'peftcore[export]'",
        "peftcore.serving pip install 'peftcore[serve]'",
        "peftcore.train pip install 'peftcore[train]'",
        "peftcore.bases.bitsandbytes_layers.linear4bit pip install 'peftcore[quant]'",
    ]

    command = subprocess.run([python.with_name("peftcore"), "run"], capture_output=True, text=True, check=False)
    assert (command.returncode, command.stdout) == (1, "")
    assert re.fullmatch(
        r"error: the command `peftcore` needs .*; install with: pip install 'peftcore\[pipeline\]'\n", command.stderr
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_runs_with_the_extra_pipeline(wheel: Path, tmp_path: Path) -> None:
    """The environment of the tests stands for a fresh one: pip finds nothing in it that the extra still needs."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index")
    run(*pip, "--dry-run", f"{wheel}[pipeline]", cwd=tmp_path)
    run(*pip, "--no-deps", "--target", "installed", str(wheel), cwd=tmp_path)
    installed = str(tmp_path / "installed")
    where = run(sys.executable, "-c", "import flows; print(flows.__file__)", cwd=tmp_path, PYTHONPATH=installed)
    assert where.startswith(installed)
    told = run(tmp_path / "installed" / "bin" / "peftcore", "--help", cwd=tmp_path, PYTHONPATH=installed)
    assert all(name in told for name in ("Usage: peftcore", "promote", "serve", "registry"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run(
        *(tmp_path / "installed" / "bin" / "peftcore", "init", "mine", "--data", "rows.jsonl"),
        cwd=tmp_path,
        PYTHONPATH=installed,
    )
    assert f'peftcore: "{peftcore.__version__}"' in (tmp_path / "mine" / ".peftcore" / "stages.yaml").read_text()
