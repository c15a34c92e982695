"""Pages of the Python API: which public names are on which page. mkdocstrings fills the pages from the docstrings."""

import ast
import re

import peftcore
from docs_site.links import ROOT
from docs_site.methods import page_of
from peftcore.registry import methods

GROUPS = {
    "models": ("Models", "peftcore.model", "peftcore.hf_peft.auto", "peftcore.hf_peft.precision"),
    "configurations": (
        "Configurations",
        "peftcore.config",
        "peftcore.registry",
        "peftcore.hf_peft.options",
        "peftcore.methods",
        "peftcore.prompts",
    ),
    "adapters": ("Adapters in a model", "peftcore.injection", "peftcore.kernels", "peftcore.layers"),
    "bases": ("Quantised base models", "peftcore.bases", "peftcore.gguf_files"),
    "start": ("Start values from data", "peftcore.hf_peft.data_start", "peftcore.hf_peft.preprocess"),
    "cartridges": ("Cartridges", "peftcore.hf_peft.cartridge"),
    "state": ("State dicts and files", "peftcore.storage"),
    "conversion": ("Conversion to LoRA", "peftcore.conversion"),
    "merging": ("Merging adapters", "peftcore.merging"),
    "composition": ("Compositions", "peftcore.composition"),
    "routing": ("Stores and routers", "peftcore.routing"),
    "training": ("Training", "peftcore.train"),
    "export": ("Export", "peftcore.export"),
    "errors": ("Errors", "peftcore.errors"),
    "hf-peft": ("Names for scripts of HF PEFT", "peftcore.hf_peft"),
}
"""{page: title, modules}. A name is on the first page that has its module or a package of it."""

PACKAGES = ("peftcore.composition", "peftcore.merging", "peftcore.routing", "peftcore.train")
"""Packages whose public names are imported from there."""

OPTIONS = {"peftcore.PeftModel": "\n    options: {inherited_members: true}"}
"""{name: options of mkdocstrings}. The methods of PeftModel are those of its base classes."""


def api_pages() -> dict[str, str]:
    """Return {path on the site: Markdown} of the API's pages."""
    configs = {method.config.__name__: name for name, method in methods().items()}
    on_page: dict[str, list[str]] = {page: [] for page in GROUPS}
    for name, module in sorted(peftcore._MODULES.items(), key=lambda item: _rank(item[1])):
        if name not in configs and module not in PACKAGES:
            on_page[_page(module)].append(f"peftcore.{name}")
    for package in PACKAGES:
        on_page[_page(package)] += [f"{package}.{name}" for name in _all(package)]
    on_page["configurations"].insert(1, "peftcore.config.TunerConfig")
    pages = {f"reference/api/{page}.md": _text(page, names) for page, names in on_page.items()}
    links = [f"- [`{name}`](../../{page_of(method)})" for name, method in sorted(configs.items())]
    pages["reference/api/configurations.md"] += "\n## Configurations of methods\n\n" + "\n".join(links) + "\n"
    return pages


def _page(module: str) -> str:
    return next(
        page for page, (_, *own) in GROUPS.items() if any(module == one or module.startswith(f"{one}.") for one in own)
    )


def _rank(module: str) -> int:
    """Return the place of a module in the list of its page."""
    _, *own = GROUPS[_page(module)]
    return next(rank for rank, one in enumerate(own) if module == one or module.startswith(f"{one}."))


def _all(package: str) -> list[str]:
    """Return a package's `__all__` without an import, which may need an extra."""
    text = (ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"^__all__ = (\[.*?\])", text, re.DOTALL | re.MULTILINE)
    assert match
    return ast.literal_eval(match[1])


def _text(page: str, names: list[str]) -> str:
    return "\n\n".join([f"# {GROUPS[page][0]}", *(f"::: {name}{OPTIONS.get(name, '')}" for name in names), ""])
