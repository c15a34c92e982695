"""The storage whose losses an adapter corrects, in a file of the adapter's folder.

An adapter that starts at the quantisation error of its base (`method.init`: loftq, qera, cloq) is worse on the 16-bit
base than on the quantised weights. Its folder says so, wherever it goes.
"""

import json
import shutil
from pathlib import Path

from pydantic import ValidationError

from flows.errors import BaseModelError
from flows.params import Params, Quantization
from flows.paths import CORRECTED_STORAGE

STARTS = ("loftq", "qera", "cloq")
"""Values of `method.init` that correct what quantising the base lost."""


def write_corrected_storage(params: Params, adapter: Path, before: Path) -> None:
    """Write the file, or copy that of the adapter from which training went on. Nothing is written for other starts.

    Args:
        params: The parameters of the run.
        adapter: The folder of the trained adapter.
        before: The folder of the adapter to continue; it may be absent.
    """
    if params.start in STARTS:
        stored = params.quantization.model_dump(include={"storage", "double_quant", "compute_dtype"})
        (adapter / CORRECTED_STORAGE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    elif (before / CORRECTED_STORAGE).exists():
        shutil.copyfile(before / CORRECTED_STORAGE, adapter / CORRECTED_STORAGE)


def corrected_storage(adapter: Path) -> Quantization | None:
    """Return the storage that an adapter corrects; None if it corrects none.

    Raises:
        BaseModelError: The file does not name a storage.
    """
    path = adapter / CORRECTED_STORAGE
    if not path.exists():
        return None
    try:
        return Quantization.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]
        raise BaseModelError(
            f"{path} names no storage of params.yaml's section quantization: {reason['msg']}"
        ) from error
