"""Let `import peft` find peftcore in this process: for libraries and scripts that import `peft` themselves.

    import peftcore.as_peft                     # the first line of a script
    python -m peftcore.as_peft SCRIPT ARGS...   # for an unchanged script
    python -m peftcore.as_peft -m MODULE ARGS...

Then `import peft`, `from peft.tuners.lora import LoraLayer` and transformers' `is_peft_available()` find peftcore,
whether HF PEFT is installed or not. Nothing changes in a process without one of these lines.

Dropout masks are then PyTorch's own, as in HF PEFT: a seeded script has the losses that it has with HF PEFT. Where
speed matters more, call `peftcore.set_dropout_masks("fast")` after the import. PiSSA and similar initialisations
subtract their start from the base weight, as in HF PEFT; `peftcore.set_start_subtraction("adapter")` keeps the base.
"""

import email.message
import importlib.metadata
import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peftcore import hf_peft
from peftcore._util.after_import import after_import
from peftcore.errors import PeftError
from peftcore.hf_peft.alias import PACKAGE, AliasFinder, MethodFinder, install
from peftcore.kernels.dropout_masks import set_dropout_masks
from peftcore.kernels.start_subtraction import set_start_subtraction

_REPORTED_VERSION = "0.22.0"
"""Version of the distribution `peft` in this process: the lowest that transformers 5.24 accepts.

`peft.__version__` is the version whose names and meanings peftcore has.
"""


class _Distribution(importlib.metadata.Distribution):
    """Metadata of a distribution `peft`."""

    @property
    def metadata(self) -> Any:
        message = email.message.Message()
        message["Name"], message["Version"] = "peft", _REPORTED_VERSION
        return message

    def read_text(self, filename: str) -> str | None:
        return "peft\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(hf_peft.__file__).parent / path


class _DistributionFinder:
    """Finder of the distribution `peft` for `importlib.metadata`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        return [_Distribution()] if getattr(context, "name", None) in (None, "peft") else []


def activate() -> None:
    """Make `import peft` find peftcore from now on, and choose HF PEFT's dropout masks and place of subtracted starts.

    Raises:
        PeftError: HF PEFT has been imported already.
    """
    present = sys.modules.get("peft")
    if present is not None and present is not hf_peft:
        raise PeftError(
            "peftcore.as_peft must be imported before the first `import peft`, and HF PEFT is imported already (by a "
            "line of the script, or by a library such as trl); move `import peftcore.as_peft` to the top of the script"
        )
    install(_DistributionFinder(), MethodFinder(), AliasFinder("peft", PACKAGE))
    set_dropout_masks("pytorch")
    set_start_subtraction("base")
    after_import("transformers.integrations.peft", "PeftAdapterMixin", _replace_load_adapter)
    after_import("transformers.trainer", "Trainer", _teach_trainer)


def _teach_trainer(_module: Any) -> None:
    from peftcore.storage.trainer_checkpoints import teach_trainer  # here, because it imports torch

    teach_trainer()


def _replace_load_adapter(module: Any) -> None:
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter into a plain model; see `peftcore.hf_peft.transformers_models.load_adapter`."""
        from peftcore.hf_peft import transformers_models  # here, because its imports may import `module`

        return transformers_models.load_adapter(self, *args, **kwargs)

    module.PeftAdapterMixin.load_adapter = load_adapter


def main(arguments: Sequence[str]) -> None:
    """Run a script or a module with the alias in place.

    Args:
        arguments: the script's path, or "-m" and a module's name; then the script's own arguments.
    """
    if not arguments or (arguments[0] == "-m" and len(arguments) < 2):
        sys.exit(
            "usage: python -m peftcore.as_peft SCRIPT ARGS...\n       python -m peftcore.as_peft -m MODULE ARGS..."
        )
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


activate()

if __name__ == "__main__":
    main(sys.argv[1:])
