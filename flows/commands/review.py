"""The page of the last run."""

from flows.commands.common import errors, project


def review() -> None:
    """Write the page of the last run again, `reports/review.html`: one file that needs no network."""
    with errors(), project() as (params, paths):
        from flows.review.page import write_review

        print(write_review(params, paths))
