"""The command that uploads an adapter to the Hugging Face hub."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import AsJson, errors, one_document


def push(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The adapter's folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="`OWNER/NAME`; created if it does not exist.")],
    message: Annotated[str, typer.Option("--message", "-m", help="First line of the commit's message.")] = (
        "Upload adapter"
    ),
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, created if it does not exist.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    tag: Annotated[list[str] | None, typer.Option(help="Tag to add to the model card; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter with its model card to the Hugging Face hub, in one commit.

    Only the adapter's own files are uploaded. Log in first with `hf auth login`, or set HF_TOKEN; HF_ENDPOINT names
    another hub.
    """
    with errors():
        from peftcore.files.hub import push_directory

        with one_document(as_json):
            info = push_directory(
                directory,
                repo_id,
                commit_message=message,
                revision=revision,
                private=private or None,
                create_pr=create_pr,
                tags=tag,
            )
        url = str(info.pr_url or info)
        print(json.dumps({"url": url, "commit": info.oid}) if as_json else url)
