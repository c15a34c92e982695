"""Hooks of mkdocs: pages that are generated or outside of `docs/`, and links between files of the repository."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs_site.api import GROUPS, api_pages
from docs_site.commands import commands_page
from docs_site.links import PAGES, ROOT, results, with_site_links
from docs_site.methods import COMMON_PAGE, method_pages, page_of, with_links_to_methods
from docs_site.params import params_page
from peftcore.registry import methods

SOURCES = {page: file for file, page in PAGES.items() if page.endswith(".md") and file.endswith(".md")}
"""{page: file of the repository that it shows}"""
TITLES = {"hf_peft_tests": "HF PEFT's tests", "qlora": "QLoRA", "quantised_forward": "4-bit layers in evaluation"}
"""{name of a results file: its title, if the name does not do}"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the folders that the navigation names with their pages."""
    pages = {
        "reference/methods/": [COMMON_PAGE, *({name: page_of(name)} for name in methods())],
        "reference/api/": [{title: f"reference/api/{page}.md"} for page, (title, *_) in GROUPS.items()],
        "benchmarks/results/": [{_title(file): file} for file in results() if file.endswith(".md")],
    }
    config.nav = _filled(config.nav, pages)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are not in `docs/`."""
    generated = method_pages() | api_pages()
    generated |= {"reference/commands.md": commands_page(), "reference/params.md": params_page()}
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    for page, file in (SOURCES | {file: file for file in results()}).items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page's text with the site's links, and with a title if the file has none."""
    path = page.file.src_uri
    if path in results():
        picture = PurePosixPath(path).with_suffix(".png")
        title = _title(path)
        markdown = f"# {title}\n\n{markdown}"
        if str(picture) in results():
            markdown += f"\n\n![{title}]({picture.name})\n"
    if path.startswith("reference/") and path not in SOURCES:
        return markdown
    if path == "methods.md":
        markdown = with_links_to_methods(markdown)
        # these links are relative to the site already
        links, _, rest = markdown.partition("\n## ")
        return (
            with_site_links(links, "docs/methods.md", path) + "\n## " + with_site_links(rest, "docs/methods.md", path)
        )
    file = SOURCES.get(path) or (path if path in results() else f"docs/{path}")
    return _with_blank_lines(with_site_links(markdown, file, path))


def _with_blank_lines(markdown: str) -> str:
    """Return the text with an empty line before each list, which GitHub does not need."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        begins = re.match(r"(?:[-*]|\d+\.) ", line) and lines and re.match(r"[^\s\-*|#\d]", lines[-1])
        if begins and not fenced:
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _title(path: str) -> str:
    name = PurePosixPath(path).stem
    return TITLES.get(name, name[:1].upper() + name[1:].replace("_", " "))


def _filled(nav: Any, pages: dict[str, Any]) -> Any:
    """Return the navigation with the pages of the folders that stand in it."""
    if isinstance(nav, str):
        return pages.get(nav, nav)
    if isinstance(nav, dict):
        return {title: _filled(value, pages) for title, value in nav.items()}
    return list(_flat(_filled(entry, pages) for entry in nav))


def _flat(entries: Any) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, list):
            yield from entry
        else:
            yield entry
