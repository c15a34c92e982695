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
import functools
import importlib.metadata
import os
import runpy
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peftcore import hf_peft
from peftcore._util.after_import import after_import
from peftcore.errors import PeftError
from peftcore.hf_peft.alias import PACKAGE, AliasFinder, MethodFinder, install
from peftcore.kernels.dropout_masks import set_dropout_masks
from peftcore.kernels.start_subtraction import set_start_subtraction

_NAME = "peftcore.as_peft"
"""Name of this module, which is "__main__" if it runs."""
_REPORTED_VERSION = "0.22.0"
"""Version of the distribution `peft` in this process: the lowest that transformers 5.24 and 5.25 accept.

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
    after_import("transformers.integrations.peft", "PeftAdapterMixin", _replace_methods)
    after_import("transformers.trainer", "Trainer", _teach_trainer)
    after_import("swift.tuners.peft", "LoraConfig", _warn_of_dtype)


def _teach_trainer(_module: Any) -> None:
    from peftcore.storage.trainer_checkpoints import teach_trainer  # here, because it imports torch

    teach_trainer()


def _warn_of_dtype(module: Any) -> None:
    """Warn of ms-swift's option `lora_dtype`, which it applies by replacing methods that peftcore never calls."""
    check = module.LoraConfig.__post_init__

    def __post_init__(self: Any) -> None:
        check(self)
        if self.lora_dtype not in (None, "float32"):
            warnings.warn(
                f"lora_dtype={self.lora_dtype!r} has no effect with peftcore, whose adapters are float32 and are cast "
                "to the type of the activations; leave it out",
                stacklevel=4,
            )

    module.LoraConfig.__post_init__ = __post_init__


def _replace_methods(module: Any) -> None:
    add = module.PeftAdapterMixin.add_adapter

    @functools.wraps(add)
    def add_adapter(self: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> Any:
        from peftcore.hf_peft import transformers_models  # here, because its imports may import `module`

        transformers_models.refuse_prompts("add_adapter", adapter_config)
        return add(self, adapter_config, *args, **kwargs)

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter into a plain model; see `peftcore.hf_peft.transformers_models.load_adapter`."""
        from peftcore.hf_peft import transformers_models  # here, for the same reason

        return transformers_models.load_adapter(self, *args, **kwargs)

    module.PeftAdapterMixin.add_adapter = add_adapter
    module.PeftAdapterMixin.load_adapter = load_adapter


_LAUNCHERS = {
    "accelerate": "accelerate launch",
    "accelerate-launch": "accelerate launch",
    "accelerate.commands.accelerate_cli": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "python -m torch.distributed.launch",
}
"""{script or module that runs another script in processes of their own: its command}"""
_TRL = ("trl", "trl.cli", "trl.cli.main")
"""Scripts and modules of TRL's command, which runs `trl.scripts` by `accelerate launch`."""
_LLAMA_FACTORY = ("llamafactory-cli", "lmf", "llamafactory.cli")
"""Scripts and modules of LLaMA-Factory's command, whose `train` runs `torchrun` on several GPUs or if it is forced."""


def _llama_factory_launches(arguments: Sequence[str]) -> bool:
    """Return True if LLaMA-Factory's command would start `torchrun` with these arguments."""
    if list(arguments[:1]) != ["train"]:
        return False
    if os.getenv("FORCE_TORCHRUN", "0").lower() in ("true", "y", "1"):
        return True
    import torch  # here, because the other programs need no count of GPUs

    return torch.cuda.device_count() > 1


def _refuse_launchers(program: str, arguments: Sequence[str]) -> None:
    """Exit with the right command if a program would run the script in another process, without the alias."""
    if _NAME in arguments:
        return
    if program in _TRL:
        name = next((argument for argument in arguments if not argument.startswith("-")), "sft")
        command = f"python -m {_NAME} -m trl.scripts.{name.replace('-', '_')} ARGS..."
        command += f"\nor, with several processes: accelerate launch -m {_NAME} {command.partition(f'{_NAME} ')[2]}"
    elif program in _LLAMA_FACTORY and _llama_factory_launches(arguments):
        command = f"torchrun --nproc-per-node N -m {_NAME} -m llamafactory.launcher ARGS..."
        command += "\nor, on one GPU: leave out FORCE_TORCHRUN, and set CUDA_VISIBLE_DEVICES to one GPU"
    elif program in _LAUNCHERS:
        command = f"{_LAUNCHERS[program]} OPTIONS... -m {_NAME} SCRIPT ARGS..."
    else:
        return
    sys.exit(
        f"python -m {_NAME}: {program} runs the script in another process, where `import peft` would not find "
        f"peftcore; run this command in place of it:\n{command}"
    )


def main(arguments: Sequence[str]) -> None:
    """Run a script or a module with the alias in place.

    A launcher, which would run the script in a process without the alias, is refused with the right command.

    Args:
        arguments: the script's path, or "-m" and a module's name; then the script's own arguments.
    """
    if not arguments or (arguments[0] == "-m" and len(arguments) < 2):
        sys.exit(
            "usage: python -m peftcore.as_peft SCRIPT ARGS...\n       python -m peftcore.as_peft -m MODULE ARGS..."
        )
    is_module = arguments[0] == "-m"
    program = arguments[1] if is_module else Path(arguments[0]).name
    _refuse_launchers(program, arguments[2 if is_module else 1 :])
    if is_module:
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
