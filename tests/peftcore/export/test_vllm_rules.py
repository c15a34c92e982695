"""`check_vllm` lists what vLLM and LoRAX would refuse or compute wrongly."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vllm_models import adapted

from peftcore.export import check_vllm, export_vllm


@pytest.mark.filterwarnings("ignore:(rank|alpha)_pattern.* match no adapted layer:RuntimeWarning")
def test_each_broken_rule_is_listed(tmp_path: Path) -> None:
    adapted(bias="all", modules_to_save=["model.norm"], alpha_pattern={"q_proj": 2}).save_pretrained(tmp_path)
    found = "\n".join(check_vllm(tmp_path, max_lora_rank=4))
    for problem in (
        "r=6 is above max_lora_rank=4",
        "modules_to_save: trained modules are not supported",
        "rank_pattern: patterns are ignored",
        "alpha_pattern: patterns",
        "base_model.model.model.norm.weight is not a factor",
        "up_proj has rank 3, not r=6",
    ):
        assert problem in found
    adapted(use_dora=True, layers_to_transform=[0, 1], target_modules=".*q_proj").save_pretrained(tmp_path / "dora")
    found = "\n".join(check_vllm(tmp_path / "dora"))
    assert "DoRA is not supported" in found and "lora_magnitude_vector is not a factor" in found
    assert "target_modules is the expression '.*q_proj'" in found


def test_what_a_directory_lacks_is_listed(tmp_path: Path) -> None:
    export_vllm(adapted(), "default", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    save_file({k: v for k, v in tensors.items() if k != key.format("B")}, weights)
    assert any("q_proj has only lora_A" in problem for problem in check_vllm(tmp_path))
    assert any("is not what the manifest says" in problem for problem in check_vllm(tmp_path))
    save_file({k: v for k, v in tensors.items() if "layers.1.self_attn" not in k}, weights)
    assert any("missing in block 1, so LoRAX" in problem for problem in check_vllm(tmp_path))
    weights.write_bytes(b"no tensors")
    assert "is not a readable adapter directory" in check_vllm(tmp_path)[0]
    assert "is not a readable adapter directory" in check_vllm(tmp_path / "absent")[0]
