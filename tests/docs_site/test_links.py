from docs_site.links import results, site_path, with_site_links


def test_links_lead_to_pages_and_files_without_a_page_keep_their_text() -> None:
    text = (
        "[run](../params.yaml), [data](../data/), [map](architecture.md#map), [a `b`](../Makefile), [x](https://x.org)"
    )
    assert with_site_links(text, "docs/pipeline.md", "pipeline.md") == (
        "[run](reference/params.md), [data](reference/data.md), [map](architecture.md#map), a `b`, [x](https://x.org)"
    )


def test_links_start_from_the_page_and_not_from_the_file() -> None:
    text = "[methods](../../docs/methods.md#parity-with-hf-peft) and [here](#below)"
    found = with_site_links(text, "peftcore/methods/README.md", "how-to/add-a-method.md")
    assert found == "[methods](../methods.md#parity-with-hf-peft) and [here](#below)"


def test_code_stays_as_it_is() -> None:
    text = "```md\n[a](b.md)\n```\n`[a](b.md)` and a cell `x \\| y`"
    assert with_site_links(text, "docs/a.md", "a.md") == "```md\n[a](b.md)\n```\n`[a](b.md)` and a cell `x | y`"


def test_pictures_of_results_keep_their_place() -> None:
    assert "benchmarks/results/gate.png" in results()
    assert site_path("benchmarks/results/gate.png") == "benchmarks/results/gate.png"
    assert site_path("peftcore/adapter.py") is None
