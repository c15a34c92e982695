from docs_site.methods import COMMON_PAGE, method_pages, page_of, with_links_to_methods
from peftcore.registry import method_table, methods


def test_every_method_has_a_page_with_its_paper_and_its_options() -> None:
    pages = method_pages()
    assert list(pages) == [COMMON_PAGE, *map(page_of, methods())]
    assert "| `target_modules`<br>" in pages[COMMON_PAGE]
    lora = pages["reference/methods/lora.md"]
    assert "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)" in lora
    assert "| `use_dora`<br>bool | `False` | " in lora
    assert "| `target_modules`" not in lora, "a common option"
    assert "| DoRA | 11,088 |" in lora
    unexplained = [line for page in pages.values() for line in page.splitlines() if line.endswith("|  |")]
    assert not unexplained, "give each option a docstring below its line"


def test_the_table_leads_to_every_page() -> None:
    table = with_links_to_methods(method_table())
    assert all(f"]({page_of(name)})" in table for name in methods())
