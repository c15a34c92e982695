"""LoRA's variants: a variant of another package, and what the seam promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peftcore
from peftcore import ConfigError, LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora.initialisation import Initialisation
from peftcore.methods.lora.variant import variants

GUIDE = Path(peftcore.__file__).parent / "methods" / "README.md"

USE = """\
import json, sys, torch
from pathlib import Path
from torch import nn
from peftcore import LoraConfig, PeftConfig, PeftModel, add_as_lora, get_peft_model
from acme_gain import GainLoraConfig

torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
x = torch.randn(3, 6, dtype=torch.float64)
base = plain(x)
model = get_peft_model(plain, GainLoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.1))
torch.testing.assert_close(model(x), base)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
model.eval()
adapted = model(x)
gains = [p for name, p in model.named_parameters() if ".lora_gain." in name]
assert len(gains) == 2 and all((gain - 1).abs().max() > 0.01 for gain in gains)
model.merge_adapter()
torch.testing.assert_close(model(x), adapted)
model.unmerge_adapter()
add_as_lora(model, "default", "plain")
model.set_adapter("plain")
torch.testing.assert_close(model(x), adapted)
model.set_adapter("default")
model.save_pretrained(sys.argv[1])
saved = json.loads((Path(sys.argv[1]) / "adapter_config.json").read_text())
assert saved["peft_type"] == "LORA" and saved["use_gain"] is True
assert type(PeftConfig.from_pretrained(sys.argv[1])) is GainLoraConfig
torch.testing.assert_close(PeftModel.from_pretrained(model.unload(), sys.argv[1])(x), adapted)
pissa = nn.Sequential(nn.Linear(6, 5)).double()
pissa = get_peft_model(pissa, GainLoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")).eval()
with torch.no_grad():
    for parameter in pissa[0].adapters.parameters():
        parameter.add_(torch.randn_like(parameter))
adapted = pissa(x)
pissa.merge_adapter()
torch.testing.assert_close(pissa(x), adapted)
print("variant by entry point:", type(LoraConfig.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.slow
def test_the_guides_variant_works_from_a_package_of_its_own(tmp_path: Path) -> None:
    variant = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    (tmp_path / "acme_gain.py").write_text(variant)
    installed = tmp_path / "acme_gain-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-gain\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[peftcore.lora_variants]\ngain = acme_gain\n")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}", str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "variant by entry point: GainLoraConfig\n", done.stderr


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "olora"}], ids=str)
def test_plain_lora_calls_no_variant_in_its_forward(options: dict) -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], **options))
    assert adapter_set(net).adapters("default")["0"].variants == ()


def test_every_variant_is_chosen_by_a_field_of_the_configuration() -> None:
    fields = LoraConfig().to_dict().keys()
    assert all(variant.option in fields for variant in variants() if variant.config is None)
    assert LoraConfig().variants() == (LoraConfig().initialisation(),)


def test_a_changed_field_changes_the_chosen_variants() -> None:
    config = LoraConfig()
    assert config.denominator(4) == 4
    config.use_rslora = True
    assert config.denominator(4) == 2


def test_every_name_of_an_initialisation_has_one_owner_and_an_unknown_one_lists_them() -> None:
    names = [name for variant in variants() if isinstance(variant, Initialisation) for name in variant.names]
    assert len(names) == len(set(names)) and {True, False, "pissa", "eva"} <= set(names)
    with pytest.raises(ConfigError, match=r"one of .*pissa_niter_N.*; got 'pisa'"):
        LoraConfig(init_lora_weights="pisa")


def test_options_of_no_variant_are_written_under_pefts_names_alone(tmp_path: Path) -> None:
    LoraConfig(r=2, target_modules=["0"]).save_pretrained(tmp_path)
    keys = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert {"use_dora", "use_rslora", "init_lora_weights", "alora_invocation_tokens"} <= keys
    assert not keys & {"variants", "size_fields", "has_schedule"}


def test_an_initialisation_draws_the_numbers_that_torch_draws_for_it() -> None:
    torch.manual_seed(3)
    net = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    adapter = adapter_set(net).adapters("default")["0"]
    torch.manual_seed(3)
    nn.Linear(6, 5)
    for sizes in ((6, 2), (2, 5)):  # PEFT's modules, with values that it overwrites
        nn.Linear(*sizes, bias=False)
    expected = nn.init.kaiming_uniform_(torch.empty(2, 6), a=5**0.5)
    assert torch.equal(adapter.lora_A_weight, expected) and not adapter.lora_B_weight.any()
