"""Pages of the site that are files of the repository outside of `docs/`, and links between all of them.

A link in a Markdown file is relative to that file in the repository, as GitHub shows it. On the site, the file may be
at another place, or it has no page.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/LOG.md": "benchmarks/log.md",
    "benchmarks/README.md": "benchmarks/programs.md",
    "data/README.md": "reference/data.md",
    "params.yaml": "reference/params.md",
    "examples/README.md": "examples/index.md",
    "examples/classification/README.md": "examples/classification.md",
    "examples/custom_method/README.md": "examples/custom_method.md",
    "examples/docstrings/README.md": "examples/docstrings.md",
    "examples/embeddings/README.md": "examples/embeddings.md",
    "examples/gguf_base/README.md": "examples/gguf_base.md",
    "examples/many_adapters/README.md": "examples/many_adapters.md",
    "examples/preference/README.md": "examples/preference.md",
    "examples/retraining/README.md": "examples/retraining.md",
    "examples/sequences/README.md": "examples/sequences.md",
    "examples/tags/README.md": "examples/tags.md",
    "peftcore/methods/README.md": "how-to/add-a-method.md",
    "peftcore/serving/README.md": "explanation/server.md",
}
"""{file of the repository: its page}"""

RESULTS = "benchmarks/results"
FENCED = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def results() -> list[str]:
    """Return the tables and pictures of measurements, which have the same path on the site."""
    folder = ROOT / RESULTS
    return sorted(f"{RESULTS}/{path.name}" for path in folder.iterdir() if path.suffix in (".md", ".png"))


def site_path(file: str) -> str | None:
    """Return the site's path of a file or folder of the repository; None if the site does not have it."""
    if (ROOT / file).is_dir():
        file = f"{file}/README.md"
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return file if file in results() else PAGES.get(file)


def _code(text: str) -> str:
    """Return code with its bars as they are: GitHub wants a backslash before one in a table, and shows it without."""
    return text if text.lstrip().startswith("```") else text.replace(r"\|", "|")


def with_site_links(markdown: str, file: str, page: str) -> str:
    """Return the text of a file of the repository with its links as they are on the site.

    A link to a file without a page is replaced by its text.

    Args:
        markdown: The text.
        file: The file's path in the repository, from which its links start.
        page: The page's path on the site.
    """

    def replace(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        path, _, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return match[0]
        target = site_path(os.path.normpath(Path(file).parent / path))
        if target is None:
            return text
        relative = os.path.relpath(target, Path(page).parent)
        return f"{image}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    # code stays as it is, but `code` inside of a link's text must not hide the link
    parts = FENCED.split(markdown)
    code = {index: _code(part) for index, part in enumerate(parts[1::2])}
    text = "".join(part if index % 2 == 0 else f"\0{index // 2}\0" for index, part in enumerate(parts))
    return re.sub(r"\0(\d+)\0", lambda match: code[int(match[1])], LINK.sub(replace, text))
