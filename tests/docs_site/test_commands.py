from docs_site.commands import commands_page


def test_the_page_has_the_commands_of_groups_too_and_no_option_of_all_commands_twice() -> None:
    page = commands_page()
    assert "## peftcore registry gc\n" in page and "## peftcore run\n" in page
    assert "| `--dry-run` | Judge only; change nothing. |" in page
    assert page.count("`--quiet`") == 1
