"""`check_vllm`: the requirements of vLLM and LoRAX on an adapter directory, checked without these runtimes.

vLLM (`vllm/lora/peft_helper.py` and `utils.py`): r, lora_alpha and target_modules are given; no modules_to_save, no
DoRA; every tensor is a factor; r is at most max_lora_rank. LoRAX: a layer name that is missing in some block is ignored
in all blocks.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peftcore.config import CONFIG_NAME
from peftcore.files import damaged_files
from peftcore.files.tensors import PREFIX, WEIGHTS_NAME

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`, apart from 1."""
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "trained modules are not supported",
    "rank_pattern": "patterns are ignored, so these layers would have a wrong rank",
    "alpha_pattern": "patterns are ignored, so these layers would have a wrong scaling",
    "lora_bias": "biases are not supported",
    "alora_invocation_tokens": "aLoRA is ignored, so the adapter would act at every position",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "raw parameters are not supported",
    "trainable_token_indices": "trained token rows are not supported",
}


def check_vllm(folder: str | Path, max_lora_rank: int = 16) -> list[str]:
    """List the reasons for which vLLM or LoRAX would refuse an adapter directory, or compute wrong outputs.

    Args:
        folder: the adapter directory.
        max_lora_rank: value of vLLM's option; 16 is its default.

    Returns:
        One message for each problem; [] if there is none.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        return [f"{folder} is not a readable adapter directory: {error}"]
    if not isinstance(config, dict):
        return [f"{CONFIG_NAME} must hold a JSON object; got a {type(config).__name__}"]
    problems = [f"{name} is not what the manifest says" for name in damaged_files(folder)]
    problems += _of_configuration(config, max_lora_rank)
    return problems + _of_tensors(shapes, config)


def _of_configuration(config: Mapping[str, Any], max_lora_rank: int) -> list[str]:
    problems = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only LORA is supported")
    if isinstance(rank := config.get("r"), int) and rank > max_lora_rank:
        problems.append(f"r={rank} is above max_lora_rank={max_lora_rank}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r}: trained biases are not supported")
    if isinstance(config.get("target_modules"), str):
        problems.append(f"target_modules is the expression {config['target_modules']!r}; write a list of names")
    return problems + [f"{name}: {why}" for name, why in _UNSUPPORTED.items() if config.get(name)]


def _of_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[str]:
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = []
    for key, shape in shapes.items():
        if match := _KEY.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = shape
        else:
            problems.append(f"{key} is not a factor of a linear layer")
    if not factors:
        problems.append("there are no lora_A and lora_B")
    targets = config.get("target_modules")
    names = {target.rpartition(".")[2] for target in targets} if isinstance(targets, list) else None
    for path, pair in factors.items():
        if len(pair) < 2:
            problems.append(f"{path} has only lora_{next(iter(pair))}")
        elif (pair["A"][0], pair["B"][-1]) != (config.get("r"),) * 2:
            problems.append(f"{path} has rank {pair['A'][0]}, not r={config.get('r')}")
        if names is not None and path.rpartition(".")[2] not in names:
            problems.append(f"{path} is not among target_modules")
    return problems + _of_blocks(factors)


def _of_blocks(paths: Mapping[str, Any]) -> list[str]:
    """List the layer names that some blocks have and others lack."""
    blocks: dict[str, set[int]] = {}
    for path in paths:
        if match := re.match(r"(.*?)\.(\d+)\.(.+)", path):
            blocks.setdefault(f"{match[1]}.*.{match[3]}", set()).add(int(match[2]))
    every = set().union(*blocks.values())
    return [
        f"{name} is missing in block {min(every - own)}, so LoRAX ignores it in all blocks"
        for name, own in blocks.items()
        if own != every
    ]
