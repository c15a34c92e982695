"""The device "second" for one process: `register` compiles it, so that PyTorch knows it from then on.

It finds what only a GPU would find otherwise: a tensor that was left on, or made on, the CPU.
"""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

DEVICE = torch.device("privateuseone", 0)
"""The device; PyTorch shows it as second:0."""


def register(folder: Path) -> None:
    """Compile the device in a folder, or take what was compiled there."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("second_device.cpp")
    library: Any = cpp_extension.load("second_device_library", [str(source)], build_directory=str(folder))
    torch.utils.rename_privateuse1_backend("second")
    library.register_hooks()
    torch._register_device_module("second", _module(library.default_generator()))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _module(generator: torch.Generator) -> types.ModuleType:
    """What `torch.cuda` is for CUDA, as far as PyTorch asks for it."""
    module: Any = types.ModuleType("torch.second")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module.empty_cache = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.manual_seed = module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda *_: generator.get_state()
    module.set_rng_state = lambda state, *_: generator.set_state(state)
    return module


class Checks:
    """Steps that are tried one after another; those that failed are told at the end.

    Args:
        allowed: names of errors by which something is refused on each device.
    """

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed
        self.failed: list[str] = []
        self.count = 0

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """Run an action and return its result; None if it failed."""
        self.count += 1
        try:
            return action()
        except Exception as error:  # each failure is told, by `finish`
            if type(error).__name__ not in self.allowed:
                self.failed.append(f"{name}: {type(error).__name__}: {error}")
            return None

    def finish(self) -> None:
        """End the process: with the number of steps, or with the failures and status 1."""
        if self.failed:
            raise SystemExit("\n".join([f"{len(self.failed)} of {self.count} steps failed", *self.failed]))
        print(f"{self.count} steps")


def check_on_device(model: torch.nn.Module) -> None:
    """Raise AssertionError unless all parameters, gradients and buffers lie on the device."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    elsewhere = [name for name, tensor in tensors.items() if tensor.device != DEVICE]
    assert not elsewhere, f"not on the device: {elsewhere[:3]}"


def check_close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError unless two tensors, on any devices, are close."""
    torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=tolerance, atol=tolerance)
