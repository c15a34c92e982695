"""Configuration of the adapter that params.yaml asks for, and the rows of its added tokens."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.errors import StageError
from flows.params import Params
from flows.params.method_fields import FIELDS
from flows.training.objectives import rows_of
from peftcore import PeftConfig
from peftcore.files import MANIFEST, write_manifest

TokenRows = dict[str, list[int]]
"""{name of an embedding: token ids whose rows are trained}"""


def adapter_config(params: Params, total_steps: int, tokens: TokenRows | None = None) -> PeftConfig:
    """Return the method's configuration.

    Args:
        params: The parameters of the run.
        total_steps: Optimiser steps of the run, for methods with a schedule.
        tokens: Rows of embeddings to train beside the adapter.

    Raises:
        ConfigError: `method.options` do not fit the method.
        StageError: The method cannot train single rows, or `method.options` names others.
    """
    method = params.method
    options: dict[str, Any] = {
        "peft_type": method.name.upper(),
        "task_type": rows_of(params).task,
        "base_model_name_or_path": params.base.source,
        "target_modules": method.target_modules,
    }
    for option, field in FIELDS.get(method.name, {}).items():
        value = method.auto.r if option == "r" and method.r == "auto" else getattr(method, option)
        if value is not None:  # null: the configuration's own default
            options[field] = value
    if method.use_rslora:
        options["use_rslora"] = True
    if (start := params.start) != "default":
        options["init_lora_weights"] = start
    config = _with_rows(PeftConfig.from_dict({**options, **method.options}), tokens)
    schedule = config.schedule_options(total_steps, method.schedule.warmup_share, method.schedule.final_share)
    return replace(config, **{name: value for name, value in schedule.items() if name not in method.options})


def _with_rows(config: PeftConfig, tokens: TokenRows | None) -> PeftConfig:
    if not tokens:
        return config
    name = "trainable_token_indices"
    if name not in {field.name for field in fields(config)}:
        raise StageError(
            f"data.special_tokens: {config.method} cannot train the embeddings of added tokens; give method.name "
            "lora, or remove the tokens"
        )
    if getattr(config, name) is not None:
        raise StageError(f"data.special_tokens and method.options.{name} both name tokens; give one of the two")
    return replace(config, **{name: tokens})


def token_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> TokenRows | None:
    """Return the rows of tokens in the input embedding, and in an output embedding with weights of its own.

    None without tokens.
    """
    if not tokens:
        return None
    ids = [int(number) for number in tokenizer.convert_tokens_to_ids(tokens)]  # pyright: ignore[reportGeneralTypeIssues]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is not None and ends[1].weight is ends[0].weight:
        ends.pop()
    return {path.rpartition(".")[2]: ids for path, module in model.named_modules() for end in ends if module is end}


def complete_manifest(folder: Path) -> None:
    """List the files that were added to an adapter's folder in its manifest, too."""
    for file in folder.iterdir():
        file.chmod(0o644)
    write_manifest(folder, [file.name for file in folder.iterdir() if file.name not in ("README.md", MANIFEST)])
