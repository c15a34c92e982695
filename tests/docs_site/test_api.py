import peftcore
from docs_site.api import api_pages


def test_every_public_name_is_on_a_page() -> None:
    text = "\n".join(api_pages().values())
    listed = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    assert not [name for name in peftcore.__all__ if name not in listed and f"[`{name}`]" not in text]
