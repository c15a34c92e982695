"""Methods are found by themselves: those here, and those of another package through its entry point."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest

import peftcore
from peftcore import ConfigError, LoraConfig, PeftType, TaskType
from peftcore.config import TunerConfig
from peftcore.registry import method_named, method_of, method_table, methods, tuner_names

GUIDE = Path(peftcore.__file__).parent / "methods" / "README.md"

USE = """\
import sys, torch
from torch import nn
import peftcore
from peftcore import PeftModel, get_peft_model
from peftcore.registry import method_table

torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
x = torch.randn(3, 6, dtype=torch.float64)
base = plain(x)
weights = {k: v.clone() for k, v in plain.state_dict().items()}
model = get_peft_model(plain, peftcore.SsfConfig(target_modules=["0", "2"]))
assert torch.equal(model(x), base)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
adapted = model(x)
assert (adapted - base).abs().max() > 0.1
model.merge_adapter()
torch.testing.assert_close(model(x), adapted)
model.unmerge_adapter()
model.add_adapter("lora", peftcore.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
model.set_adapter(["default", "lora"])
both = model(x)
model.merge_adapter()
torch.testing.assert_close(model(x), both)
model.unmerge_adapter()
model.save_pretrained(sys.argv[1])
plain = model.unload()
assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())
torch.testing.assert_close(PeftModel.from_pretrained(plain, sys.argv[1])(x), adapted)
assert "| SSF | `SsfConfig` |" in method_table()
print("method by entry point:", peftcore.SsfConfig.peft_type)
"""


def guides_method() -> str:
    """The file that the guide shows."""
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.slow
def test_the_guides_method_works_from_a_package_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "acme_ssf.py").write_text(guides_method())
    (tmp_path / "another_package.py").write_text("another = 1\n")
    installed = tmp_path / "acme_ssf-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-ssf\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[peftcore.methods]\nssf = acme_ssf\n")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}", str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "method by entry point: SSF\n", done.stderr


def test_the_guides_method_is_as_short_as_it_says() -> None:
    assert len(guides_method().splitlines()) < 80


def test_every_method_is_found_and_named_after_its_own_file() -> None:
    assert {"LORA", "ADALORA", "IA3", "OFT"} <= set(methods())
    for name, method in methods().items():
        assert method.config.peft_type == name
        assert getattr(peftcore, method.config.__name__) is method.config
        assert f"| {name} |" in method_table()


def test_names_without_importing_are_those_of_the_methods() -> None:
    tuners = {name for name, method in methods().items() if issubclass(method.config, TunerConfig)}
    assert set(tuner_names()) == tuners - {"LOREFT", "SHADOW"}, "they have targets, and are methods of the whole model"


def test_an_unknown_method_is_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'LORA'"):
        method_named("LORAA")
    with pytest.raises(ConfigError, match="unknown adapter method 'SSF', which no installed package defines"):
        method_named("SSF")
    with pytest.raises(ConfigError, match="got the class LoraConfig"):
        method_of(LoraConfig)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="LoraaConfig"):
        _ = peftcore.LoraaConfig
    assert method_named("LORA").config is LoraConfig


def test_each_method_of_hf_peft_is_here() -> None:
    """A new release of HF PEFT with another method fails here."""
    theirs = {kind.value for kind in peft.PeftType}
    assert {PeftType(name).value for name in theirs} == theirs <= methods().keys()


@pytest.mark.parametrize("method", sorted(kind.value for kind in peft.PeftType))
def test_each_option_of_hf_peft_is_here_or_refused(method: str) -> None:
    """A new release of HF PEFT with another option fails here."""
    theirs = dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)])
    ours = method_named(method).config
    missing = {field.name for field in theirs} - {field.name for field in dataclasses.fields(ours)}
    assert missing <= {*ours.ignored_on_disk, "runtime_config"}, "runtime_config is never saved"
    for option in missing - {"runtime_config"}:
        with pytest.raises(ConfigError, match=rf"{option}.*would change the results"):
            ours.from_dict({"peft_type": method, option: "another value"}, from_disk=True)


@pytest.mark.parametrize("ours, theirs", [(PeftType, peft.PeftType), (TaskType, peft.TaskType)])
def test_the_text_of_an_enumeration_is_that_of_hf_peft(ours: Any, theirs: Any):
    """Examples of HF PEFT name folders after it: f"{model}_{config.peft_type}_{config.task_type}"."""
    for member in theirs:
        same = ours(member.value)
        assert (str(same), f"{same}", repr(same)) == (str(member), f"{member}", repr(member))
        assert same == member.value and json.dumps(same) == json.dumps(member)
