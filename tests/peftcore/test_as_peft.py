"""`python -m peftcore.as_peft` runs a script written for HF PEFT."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
assert isinstance(model[0], LoraLayer) and type(model).__mro__[1].__module__.startswith("peftcore.model.")
x = torch.randn(3, 4)
y = model(x)
model.save_pretrained(sys.argv[1])
plain = model.unload()
assert torch.equal(PeftModel.from_pretrained(plain, sys.argv[1])(x), y)
print(__name__, sys.argv[1:])
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peftcore.as_peft", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_script_runs_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run(script, tmp_path / "adapter")
    assert done.stdout == f"__main__ ['{tmp_path / 'adapter'}']\n", done.stderr


def test_without_a_script_there_is_a_usage_line() -> None:
    done = run()
    assert done.returncode
    assert "python -m peftcore.as_peft SCRIPT" in done.stderr


LAUNCHERS = {
    "/usr/bin/trl sft --use_peft": "python -m peftcore.as_peft -m trl.scripts.sft ARGS...",
    "-m trl.cli dpo": "accelerate launch -m peftcore.as_peft -m trl.scripts.dpo ARGS...",
    "accelerate launch train.py": "accelerate launch OPTIONS... -m peftcore.as_peft SCRIPT ARGS...",
    "-m accelerate.commands.launch train.py": "accelerate launch OPTIONS... -m peftcore.as_peft SCRIPT ARGS...",
    "/usr/bin/torchrun --nproc-per-node 2 train.py": "torchrun OPTIONS... -m peftcore.as_peft SCRIPT ARGS...",
    "-m torch.distributed.run train.py": "torchrun OPTIONS... -m peftcore.as_peft SCRIPT ARGS...",
    "-m torch.distributed.launch a.py": "torch.distributed.launch OPTIONS... -m peftcore.as_peft SCRIPT ARGS...",
}
"""{arguments of the alias: command that the error gives}"""
ERRORS = """\
import sys
from peftcore.as_peft import main
for arguments in sys.argv[1:]:
    try:
        main(arguments.split())
    except SystemExit as error:
        print(str(error.code).replace("\\n", " "))
"""


def test_a_launcher_is_refused_with_the_right_command() -> None:
    command = [sys.executable, "-c", ERRORS, *LAUNCHERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    messages = done.stdout.splitlines()
    assert len(messages) == len(LAUNCHERS), done.stderr
    for message, right in zip(messages, LAUNCHERS.values(), strict=True):
        assert "in another process" in message and right in message


def test_llama_factory_is_refused_if_it_would_run_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    done = run("-m", "llamafactory.cli", "train", "train.yaml")
    assert "torchrun --nproc-per-node N -m peftcore.as_peft -m llamafactory.launcher ARGS..." in done.stderr
    for setting, arguments in (("1", ["export", "merge.yaml"]), ("0", ["train", "train.yaml"])):
        monkeypatch.setenv("FORCE_TORCHRUN", setting)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert "in another process" not in run("-m", "llamafactory.cli", *arguments).stderr


@pytest.mark.slow
def test_a_launcher_that_runs_the_alias_is_not_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import peft; print(peft.get_peft_model.__module__)")
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "peftcore.as_peft", script)
    assert done.stdout.startswith("peftcore."), done.stderr


MS_SWIFT = """\
from dataclasses import dataclass

import peft
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from peft.tuners.lora import Linear
from peft.tuners.lora.tp_layer import LoraParallelLinear

@dataclass
class LoraConfig(peft.LoraConfig):
    lora_dtype: str | None = None

class Parallel(LoraParallelLinear):
    pass

def hook(*args, **kwargs):
    raise AssertionError

for model in (peft.LoraModel, peft.AdaLoraModel, peft.VeraModel, peft.BOFTModel, peft.FourierFTModel):
    model._create_and_replace_origin = model._create_and_replace
    model._create_and_replace = hook
peft.LoraModel._cast_adapter_dtype_origin = peft.LoraModel._cast_adapter_dtype
peft.LoraModel._cast_adapter_dtype = AdaLoraModel.forward = RankAllocator.mask_to_budget = hook
"""
"""What ms-swift 4.6 does to HF PEFT when it is imported."""


def test_the_methods_that_ms_swift_replaces(tmp_path: Path) -> None:
    (tmp_path / "swift" / "tuners").mkdir(parents=True)
    (tmp_path / "swift" / "tuners" / "peft.py").write_text(MS_SWIFT)
    script = tmp_path / "script.py"
    script.write_text(
        "import peft, torch\nfrom swift.tuners.peft import LoraConfig\n"
        "for dtype in (None, 'float32', 'bfloat16'):\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=['0'], lora_dtype=dtype))\n"
        "    print(model[0].lora_A['default'].weight.dtype)\n"
    )
    done = run(script)
    assert done.stdout.split() == ["torch.float32"] * 3, done.stderr
    assert done.stderr.count("has no effect with peftcore") == 1
    assert "script.py:5: UserWarning: lora_dtype='bfloat16' has no effect" in done.stderr
