"""Views register for the classes that they read."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftcore import ConfigError, LoraConfig, TargetError, get_peft_model, register_storage
from peftcore.bases import base_weight, is_adaptable
from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import registered_classes
from peftcore.detection import detect

GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "add-a-storage.md"

USE = """\
import sys, torch
from torch import nn
from acme_ternary import TernaryLinear
from peftcore import IA3Config, LoraConfig, PeftModel, dequantize_base, get_layer_status, get_peft_model

torch.manual_seed(0)
plain = nn.Sequential(TernaryLinear(nn.Linear(8, 8)), nn.ReLU(), TernaryLinear(nn.Linear(8, 4)))
x = torch.randn(3, 8)
base = plain(x)
weights = {k: v.clone() for k, v in plain.state_dict().items()}
model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "2"]))
assert torch.equal(model(x), base)
view = f"{type(model[0].base).__module__}.{type(model[0].base).__name__}"
assert {layer.quantization_backend for layer in get_layer_status(model)} == {"ternary"}
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
adapted = model(x)
assert (adapted - base).abs().max() > 0.1
before = model[0].base.read()
wanted = model[0].adapters["default"].merged_weight(before)
model.merge_adapter()
scale = wanted.abs().mean()
assert torch.equal(model[0].base.read(), (wanted / scale).round().clamp(-1, 1) * scale)
model.unmerge_adapter()
assert torch.equal(model(x), adapted)
model.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False))
rows = model(x, adapter_names=["default", "__base__", "ia3"])
torch.testing.assert_close(rows[:2], torch.stack([adapted[0], base[1]]))
model.delete_adapter("ia3")
model.save_pretrained(sys.argv[1])
plain = model.unload()
assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())
loaded = PeftModel.from_pretrained(plain, sys.argv[1])
torch.testing.assert_close(loaded(x), adapted)
merged = dequantize_base(loaded).merge_and_unload()
assert type(merged[0]) is nn.Linear
torch.testing.assert_close(merged(x), adapted)
print("storage by entry point:", view)
"""


@pytest.mark.slow
def test_the_guides_storage_works_from_a_package_of_its_own(tmp_path: Path) -> None:
    guide = re.search(r"```python\n(\"\"\"Linear layers with the weights.*?)```", GUIDE.read_text(), re.DOTALL)
    assert guide is not None
    (tmp_path / "acme_ternary.py").write_text(guide.group(1))
    installed = tmp_path / "acme_ternary-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-ternary\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[peftcore.storages]\nternary = acme_ternary\n")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}", str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "storage by entry point: acme_ternary.TernaryWeight\n", done.stderr


def test_the_storages_of_this_package_are_registered() -> None:
    expected = {"bitsandbytes.Params4bit", "bitsandbytes.Int8Params", "torchao.TorchAOBaseTensor", "hqq.HQQLinear"}
    assert expected | {"gptqmodel.GPTQQuantLinear", "gptqmodel.AWQuantLinear"} <= set(registered_classes())


@pytest.mark.parametrize("name", ["HQQLinear", "hqq.core.HQQLinear", "hqq.", "hqq.HQQ Linear"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no top-level package and class; give a name such as 'hqq\.HQQLinear'"):
        register_storage(name)


def test_a_class_has_one_view() -> None:
    with pytest.raises(ConfigError, match=r"hqq\.HQQLinear has the view peftcore\.bases\.hqq\.HqqWeight already"):

        @register_storage("hqq.HQQLinear")
        class _Other(LinearWeight):
            pass


def test_a_layer_of_an_unknown_class_is_refused_with_the_classes_that_fit() -> None:
    with pytest.raises(TargetError, match=r"is a Bilinear, which cannot be adapted.*hqq\.HQQLinear"):
        base_weight(nn.Bilinear(2, 2, 2))


class TorchAOBaseTensor(torch.Tensor):
    """A weight of torchao that the library may add."""


def test_a_weight_of_another_kind_is_refused_with_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchAOBaseTensor, "__module__", "torchao.utils")
    layer = nn.Linear(4, 4)
    weight: Any = layer.weight.detach().as_subclass(TorchAOBaseTensor)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    assert not is_adaptable(layer)
    with pytest.raises(TargetError, match=r"has no layer to adapt.*was left out: its weight is torchao's TorchAOBase"):
        detect(nn.Sequential(layer))
    with pytest.raises(TargetError, match=r"0 is a Linear.*TorchAOBaseTensor.*Int8Tensor and IntxUnpackedToInt8Tensor"):
        get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
