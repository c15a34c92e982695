"""One page for each adapter method: the docstring of its module, its options, and what was measured of it."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import textwrap
from functools import cache

from docs_site.links import RESULTS, ROOT
from peftcore.config import PeftConfig, PromptLearningConfig, TunerConfig
from peftcore.registry import Method, methods

COMMON = (PeftConfig, TunerConfig, PromptLearningConfig)
"""Their options have a page of their own, because many methods have them."""
COMMON_PAGE = "reference/methods/common-options.md"


def method_pages() -> dict[str, str]:
    """Return {path on the site: Markdown} of all methods, and of the options that many have, which come first."""
    return {COMMON_PAGE: _common_page()} | {page_of(name): _page(method) for name, method in methods().items()}


def page_of(name: str) -> str:
    """Return the path of a method's page."""
    return f"reference/methods/{name.lower()}.md"


def with_links_to_methods(markdown: str) -> str:
    """Return the method table with a link from each name to the method's page."""
    for name, method in methods().items():
        config = method.config.__name__
        broken = re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", config)  # long names may break, so that the table is not wide
        markdown = markdown.replace(
            f"\n| {name} | `{config}` ",
            f"\n| [{name.replace('_', '_<wbr>')}]({page_of(name)}) | <code>{broken}</code> ",
        )
    return markdown


def _page(method: Method) -> str:
    document = inspect.getdoc(importlib.import_module(method.adapter.__module__)) or ""
    summary, _, rest = document.partition("\n")
    config = method.config.__name__
    kinds = ", ".join(sorted(method.adapter.layer_kinds))
    adapts = "A prompt of the whole model." if kinds == "model" else f"Adapts layers of the kinds {kinds}."
    return "\n".join(
        [
            f"# {method.name}\n",
            f"{_as_markdown(summary)}\n",
            f"{adapts} Configuration: `from peftcore import {config}`.\n",
            _as_markdown(rest.strip()),
            "\n## Options\n",
            f"Options of `{config}` besides the [common options](common-options.md).\n",
            _options(method.config, _own_options(method.config)),
            *_measured(method.name),
        ]
    )


def _common_page() -> str:
    every, tuner, prompt = (list(dataclasses.fields(config)) for config in COMMON)
    names = {field.name for field in every}
    parts = ["# Common options\n", "## Of every method\n", _options(PeftConfig, names)]
    parts += ["## Of methods that adapt layers\n", _options(TunerConfig, {field.name for field in tuner} - names)]
    parts += ["## Of prompt methods\n", _options(PromptLearningConfig, {field.name for field in prompt} - names)]
    return "\n".join(parts)


def _own_options(config: type[PeftConfig]) -> set[str]:
    """Return the options that are not common, or that the method's own classes declare anew."""
    common = {field.name for base in COMMON for field in dataclasses.fields(base)}
    own = {name for base in config.__mro__ if _is_own(base) for name in inspect.get_annotations(base)}
    return {field.name for field in dataclasses.fields(config)} - (common - own)


def _options(config: type[PeftConfig], names: set[str]) -> str:
    """Return a table of these options of a configuration."""
    meanings = _meanings(config)
    rows = [
        f"| `{field.name}`<br>{_type(field.type)} | {_default(field)} | {_cell(meanings.get(field.name, ''))} |"
        for field in dataclasses.fields(config)
        if field.init and field.name in names
    ]
    if not rows:
        return "No further options.\n"
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows, ""])


def _is_own(base: type) -> bool:
    return issubclass(base, PeftConfig) and base not in COMMON


def _meanings(config: type[PeftConfig]) -> dict[str, str]:
    """Return the docstring of each option; a subclass wins."""
    documents: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if issubclass(base, PeftConfig):
            documents |= _own_meanings(base)
    return documents


@cache
def _own_meanings(config: type[PeftConfig]) -> dict[str, str]:
    """Return the docstrings of the options of this class, which stand below them in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    documents: dict[str, str] = {}
    for statement, document in zip(body.body, body.body[1:], strict=False):
        match statement, document:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                documents[name] = inspect.cleandoc(text)
    return documents


def _type(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b[a-z_.]+\.(?=[A-Z])", "", text)
    return text.replace(" | ", " or ").replace("[", r"\[")


def _default(field: "dataclasses.Field[object]") -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
        return f"`{repr(str(value)) if isinstance(value, str) else repr(value)}`"
    factory = field.default_factory
    if factory is dataclasses.MISSING:
        return "required"
    return f"`{factory.__name__}()`" if dataclasses.is_dataclass(factory) else f"`{factory()!r}`"


def _cell(text: str) -> str:
    """Return text for a cell of a table: one paragraph, without bars."""
    return _as_markdown(re.sub(r"\s*\n\s*", " ", text)).replace("|", "&#124;")


def _as_markdown(text: str) -> str:
    """Return a docstring with its formulas protected from Markdown, and its papers linked."""
    parts = re.split(r"(`+[^`]*`+)", text)
    for index in range(0, len(parts), 2):
        plain = re.sub(r"([*<\[])", r"\\\1", parts[index])
        plain = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)
        plain = re.sub(r"\b((?:openreview\.net|doi\.org)/[\w./?=-]*\w)", r"[\1](https://\1)", plain)
        parts[index] = re.sub(r"_(?!\w)|(?<!\w)_", r"\\_", plain)
    return "".join(parts)


def _measured(name: str) -> list[str]:
    """Return what the repository's own measurements say about a method."""
    rows = json.loads((ROOT / RESULTS / "learning.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        f"| {row['name']} | {row['trainable']:,} | {row['steps']} | {row['loss_before']:.2f} | {row['loss_after']:.2f} "
        f"| {row['accuracy']:.0%} |"
        for row in rows
        if row["method"] == name
    ]
    if not lines:
        return []
    return [
        "## Measured\n",
        "One small task for every method: handwritten digits that are shown transposed "
        "([all methods](../../figures.md#how-every-method-learns)). It shows that the method learns; it is no ranking "
        "for other tasks.\n",
        "| method | trainable parameters | steps | loss before, nats | loss after | accuracy |",
        "|---|---:|---:|---:|---:|---:|",
        *lines,
        "",
    ]
