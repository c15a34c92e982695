"""What vLLM and LoRAX ask of an adapter directory, checked without either.

vLLM: `vllm/lora/peft_helper.py` and `utils.py` (r, lora_alpha, target_modules; no modules_to_save, no DoRA; every
tensor a factor; r up to max_lora_rank). LoRAX: a name of layers that some block lacks is left out whole.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peftcore._util.tensors import PREFIX, WEIGHTS_NAME
from peftcore.config import CONFIG_NAME
from peftcore.files import damaged_files

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks above 1 that `--max-lora-rank` may be."""
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_OFF = {
    "use_dora": "DoRA is not read",
    "modules_to_save": "whole modules are not read",
    "rank_pattern": "patterns are not read, so these layers would have another rank",
    "alpha_pattern": "patterns are not read, so these layers would be scaled wrongly",
    "lora_bias": "biases are not read",
    "alora_invocation_tokens": "aLoRA is not read, so the adapter would act everywhere",
    "layer_replication": "a deeper model is not made",
    "target_parameters": "raw parameters are not adapted",
    "trainable_token_indices": "token rows are not read",
}


def check_vllm(folder: str | Path, max_lora_rank: int = 16) -> list[str]:
    """Every reason for which vLLM or LoRAX would refuse this directory or compute something else; [] for none.

    max_lora_rank: vLLM's option of that name; 16 is its default.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        return [f"{folder} is no readable adapter directory: {error}"]
    if not isinstance(config, dict):
        return [f"{CONFIG_NAME} holds a {type(config).__name__}, not the fields of a configuration"]
    problems = [f"{name} is not what the manifest says" for name in damaged_files(folder)]
    problems += _of_configuration(config, max_lora_rank)
    return problems + _of_tensors(shapes, config)


def _of_configuration(config: Mapping[str, Any], max_lora_rank: int) -> list[str]:
    problems = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only LORA is read")
    if isinstance(rank := config.get("r"), int) and rank > max_lora_rank:
        problems.append(f"r={rank} is above max_lora_rank={max_lora_rank}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r}: trained biases are not read")
    if isinstance(config.get("target_modules"), str):
        problems.append(f"target_modules is the expression {config['target_modules']!r}; write a list of names")
    return problems + [f"{name}: {why}" for name, why in _OFF.items() if config.get(name)]


def _of_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[str]:
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = []
    for key, shape in shapes.items():
        if match := _KEY.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = shape
        else:
            problems.append(f"{key} is no factor of a linear layer")
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
    """Layers that some blocks have and others lack."""
    blocks: dict[str, set[int]] = {}
    for path in paths:
        if match := re.match(r"(.*?)\.(\d+)\.(.+)", path):
            blocks.setdefault(f"{match[1]}.*.{match[3]}", set()).add(int(match[2]))
    every = set().union(*blocks.values())
    return [
        f"{name} is missing in block {min(every - own)}, for which LoRAX leaves all of them out"
        for name, own in blocks.items()
        if own != every
    ]
