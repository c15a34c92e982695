"""A base's folder without its weights: the check of its files, its tokenizer, its padding. Imports no model code."""

import hashlib
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flows.base.calibrated import calibration_record
from flows.errors import BaseModelError
from peftcore.files import MANIFEST, damaged_files


def check_base(folder: Path) -> str:
    """Check the base's files against its manifest.

    Returns:
        The SHA-256 (hex) of the manifest.

    Raises:
        BaseModelError: The folder is absent, or a file is damaged.
    """
    manifest = folder / MANIFEST
    stage = "fetch" if calibration_record(folder) is None else "calibrate --force"
    if not manifest.exists():
        raise BaseModelError(f"there is no base model in {folder}; run `peftcore stage {stage}` first")
    damaged = damaged_files(folder)
    if damaged:
        raise BaseModelError(
            f"{folder}: {', '.join(damaged)} is damaged or missing; run `peftcore stage {stage}` again"
        )
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises BaseModelError if there is no such folder."""
    if not folder.is_dir():
        raise BaseModelError(f"there is no base model in {folder}; run `peftcore stage fetch` first")
    return AutoTokenizer.from_pretrained(folder)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's padding id, or the end-of-sequence id; attention mask and labels hide padding."""
    return cast(int, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
