"""A subclass of Tensor, which compiled code must leave to PyTorch."""

from torch import Tensor


class Marked(Tensor):
    """A subclass, as of a library that keeps data of its own with a tensor."""
