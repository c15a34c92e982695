"""Export of an adapter directory for other runtimes."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Any

from flows.errors import PipelineError

log = logging.getLogger(__name__)


class Format(StrEnum):
    """Export formats."""

    GGUF_LORA = "gguf-lora"
    GGUF_MERGED = "gguf-merged"
    VLLM = "vllm"


def export(
    form: Format,
    adapter: Path,
    base: Path,
    out: Path,
    gguf: Path | None,
    dtype: str | None,
    rank: int | None,
    tolerance: float | None,
) -> str:
    """Export the adapter for llama.cpp, or for vLLM and LoRAX.

    Args:
        form: the format.
        adapter: the adapter's folder.
        base: the base's folder.
        out: the file or folder to write.
        gguf: for gguf-merged, the base's own GGUF file; None converts the base's folder.
        dtype: type of the matrices in a GGUF file; None: float16.
        rank: convert to LoRA of this rank first, see `peftcore.add_as_lora`.
        tolerance: convert to LoRA with at most this relative error per layer first.

    Returns:
        One sentence that names the written files.

    Raises:
        PeftError: the adapter cannot be exported.
        PipelineError: an option does not fit the format.
    """
    from flows.base.gguf import FILE, holds_gguf
    from peftcore.export import check_gguf_base, export_gguf_lora, export_gguf_merged, export_vllm

    if form == Format.GGUF_MERGED and gguf is None and holds_gguf(base):
        gguf = base / FILE
    if form == Format.GGUF_MERGED and gguf is None:
        check_gguf_base(base)  # before the model is loaded
    if form != Format.GGUF_MERGED and gguf is not None:
        raise PipelineError(f"--gguf has no effect on {form}, only on gguf-merged; leave it out")
    if form == Format.VLLM and dtype is not None:
        raise PipelineError(f"--dtype has no effect on {form}, only on gguf-lora and gguf-merged; leave it out")
    dtype = dtype or "float16"
    model, name, note = _adapted(adapter, base), "default", ""
    if rank is not None or tolerance is not None:
        note, name = _converted(model, rank, tolerance), "plain"
    if form == Format.VLLM:
        return f"{out}: for vLLM and LoRAX, --max-lora-rank {export_vllm(model, name, out)}{note}"
    if form == Format.GGUF_LORA:
        return f"{export_gguf_lora(model, name, out, dtype=dtype)}: for llama.cpp, --lora beside the base{note}"
    return f"{export_gguf_merged(gguf or base, model, out, name, dtype)}: a whole model for llama.cpp{note}"


def check_export(form: Format, gguf: Path | None, corrected: Any) -> None:
    """Warn of a format that leaves the base to the reader although the adapter corrects a quantised base.

    Args:
        form: the format.
        gguf: the base's own GGUF file, if it was given.
        corrected: the `Quantization` that the adapter corrects; None for any other adapter.

    Raises:
        PipelineError: the adapter cannot be merged into that file.
    """
    if corrected is None:
        return
    fits = f"the adapter corrects what {corrected.storage} lost (method.init), so it fits those weights alone"
    if form == Format.GGUF_MERGED:
        if gguf is not None:
            raise PipelineError(f"{fits}, and not {gguf}; leave --gguf out, or train with method.init: default")
        return
    log.warning("%s: on the 16-bit base its answers are worse; export gguf-merged, or train with init: default", fits)


def _adapted(adapter: Path, base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from flows.base.gguf import holds_gguf, load_packed
    from peftcore import PeftModel

    if holds_gguf(base):
        return PeftModel.from_pretrained(load_packed(base, torch.float32, torch.device("cpu")), adapter)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype="auto")
    return PeftModel.from_pretrained(model, adapter)


def _converted(model: Any, rank: int | None, tolerance: float | None) -> str:
    from peftcore.conversion import add_as_lora

    report = add_as_lora(model, "default", "plain", rank, tolerance)
    return f"; converted to LoRA of rank {max(report.ranks.values())}, relative error {report.error:.2%}"
