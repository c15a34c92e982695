"""Helpers for tests of the registry: versions without files, people, and signatures."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.registry.registry import Registry, Version
from flows.registry.signatures import Signature, signature_of
from flows.runtime.git import Git

needs_keys = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
Key = Callable[[str], Path]


def of(project: Any, signing: Path | None = None) -> Registry:
    return Registry(Git(project.root), "docstrings", signing)


def add(registry: Registry, number: str = "v0.1.0") -> Version:
    return registry.register(number, "a" * 64, {"version": number}, {"dvc.lock": "{}\n"}, "good")


def signature(registry: Registry, name: str, signers: Path) -> Signature:
    return signature_of(registry.git, registry.git.tags(name)[0], signers)


def be(project: Any, who: str) -> None:
    project.git("config", "user.email", f"{who}@example.org")
