"""Putting adapters into a model, choosing the active ones, merging them into the weights."""

from peftcore.injection.targets import find_targets

__all__ = ["find_targets"]
