"""Modules under several names are one module."""

import importlib
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import peftcore
from peftcore.hf_peft.alias import SUBMODULES


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", SUBMODULES)
def test_a_submodule_of_peft_is_a_submodule_of_peftcore(name: str) -> None:
    importlib.import_module(f"peft.{name}")  # the place exists in PEFT
    ours = importlib.import_module(f"peftcore.{name}")
    assert ours is importlib.import_module(f"peftcore.hf_peft.{name}")
    assert getattr(peftcore, name) is ours
    assert ours.__spec__ is not None
    assert ours.__spec__.name == f"peftcore.hf_peft.{name}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("tuners.lora", "LoraLayer"),
        ("tuners.lora.layer", "Linear"),
        ("tuners.lora.config", "LoraConfig"),
        ("tuners.lora.model", "LoraModel"),
        ("tuners.lora.variants", "get_alora_offsets_for_forward"),
        ("tuners.ia3", "IA3Config"),
        ("tuners.lokr.layer", "factorization"),
        ("tuners.ia3.layer", "IA3Layer"),
        ("tuners.adalora.model", "AdaLoraModel"),
        ("tuners.prompt_tuning", "PromptTuningConfig"),
        ("tuners.lora.bnb", "Linear4bit"),
        ("tuners.lora.conversion", "save_as_lora"),
        ("tuners.lora.eva", "get_eva_state_dict"),
        ("tuners.adamss.asa_callback", "AdamssAsaCallback"),
        ("tuners.tuners_utils", "BaseTunerLayer"),
        ("optimizers.lorafa", "create_lorafa_optimizer"),
        ("optimizers.loraplus", "create_loraplus_optimizer"),
        ("optimizers.riemannian", "create_riemannian_optimizer"),
        ("config", "PeftConfig"),
        ("utils.other", "ModulesToSaveWrapper"),
        ("utils.save_and_load", "get_peft_model_state_dict"),
        ("utils.hotswap", "hotswap_adapter"),
        ("utils", "SAFETENSORS_WEIGHTS_NAME"),
        ("mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
    ],
)
def test_scripts_import_a_name_from_where_peft_has_it(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(f"peft.{module}"), name)
    assert hasattr(importlib.import_module(f"peftcore.{module}"), name)


def test_a_submodule_is_an_attribute_without_an_import_of_its_own() -> None:
    paths = (
        "tuners.lora.LoraLayer",
        "tuners.lora.layer.Linear",
        "tuners.tuners_utils.BaseTunerLayer",
        "tuners.adalora.model.AdaLoraModel",
        "utils.other.ModulesToSaveWrapper",
        "utils.save_and_load.get_peft_model_state_dict",
        "optimizers.lorafa.create_lorafa_optimizer",
    )
    found = "".join(f"peft.{path}.__name__, " for path in paths)
    missing = (
        "tuners.no_such_method",
        "tuners.ia3.no_such_module",
        "tuners.lora.no_such_module",
        "utils.no_such_module",
    )
    absent = "".join(f"hasattr(peft.{path.rpartition('.')[0]}, {path.rpartition('.')[2]!r}), " for path in missing)
    printed = run(f"import peftcore as peft\nprint([{found}], [{absent}])").splitlines()[-1]
    assert printed == f"{[path.rpartition('.')[2] for path in paths]} {[False] * len(missing)}"


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "mapping_func",
        "mixed_model",
        "peft_model",
        "utils.constants",
        "utils.error",
        "utils.loftq_utils",
        "utils.peft_types",
        "utils.save_and_load",
    ],
)
def test_a_module_that_only_imports_names_has_those_of_pefts_module(module: str) -> None:
    ours, theirs = (importlib.import_module(f"{package}.{module}") for package in ("peftcore.hf_peft", "peft"))
    assert [name for name in ours.__all__ if not hasattr(theirs, name)] == []


def test_a_class_is_the_same_class_in_each_place() -> None:
    import peftcore.tuners.lora.config as config

    assert config.LoraConfig is peftcore.LoraConfig
    assert peftcore.tuners.lora.LoraConfig is peftcore.LoraConfig


def test_an_unknown_module_or_name_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peftcore.tuners.no_such_method")
    with pytest.raises(ImportError):
        exec("from peftcore.tuners.ia3 import NoSuchName")
    assert not hasattr(peftcore, "no_such_name")


@pytest.mark.slow
def test_with_the_alias_import_peft_finds_peftcore() -> None:
    printed = run(
        "import peftcore.as_peft, peft, peftcore, importlib.metadata as metadata\n"
        "from peft.tuners.lora import LoraLayer\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from peft.config import PeftConfigMixin\n"
        "from peft.optimizers.loraplus import create_loraplus_optimizer\n"
        "assert issubclass(LoraConfig, PeftConfigMixin)\n"
        "assert peft is peftcore.hf_peft and LoraConfig is peftcore.LoraConfig\n"
        "assert LoraLayer is peftcore.tuners.lora.LoraLayer\n"
        "assert peft.__version__ == '0.21.2'\n"
        "from packaging.version import Version\n"
        "from transformers.integrations.peft import MIN_PEFT_VERSION\n"
        "assert Version(metadata.version('peft')) >= Version(MIN_PEFT_VERSION)\n"
        "from transformers.utils import is_peft_available\n"
        "assert is_peft_available()\n"
        "print('fine')"
    )
    assert printed.endswith("fine\n")


def test_the_alias_after_peft_says_to_move_the_line_up() -> None:
    assert peft  # this process has imported HF PEFT
    with pytest.raises(peftcore.PeftError, match=r"move `import peftcore\.as_peft` to the top of the script"):
        importlib.import_module("peftcore.as_peft")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["accelerate.commands.launch", "--cpu"], ["torch.distributed.run"]])
def test_a_launcher_runs_a_script_or_a_module_with_the_alias(launcher: list[str], tmp_path: Path) -> None:
    pytest.importorskip(launcher[0])
    (tmp_path / "script.py").write_text("import sys, peft\nprint(peft.__name__, *sys.argv[1:])\n")
    for started in (["script.py"], ["-m", "script"]):
        command = [sys.executable, "-m", *launcher, "-m", "peftcore.as_peft", *started, "--epochs", "3"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "peftcore.hf_peft --epochs 3\n" in done.stdout, done.stderr
