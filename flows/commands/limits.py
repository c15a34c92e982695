"""The command `limits`: limits of the gate that the last run's figures support."""

import json
from typing import Annotated

import typer

from flows.commands.common import AsJson, errors, project


def limits(
    write: Annotated[bool, typer.Option("--write", help="Write the limits into params.yaml.")] = False,
    as_json: AsJson = False,
) -> None:
    """Propose limits of the gate that are stricter than the present ones, from the last run's figures.

    For a first version, which had no champion to beat. A later version then has to show half of the gain over the base
    that the last run has certainly shown (the lower confidence bound of the gain).
    """
    with errors(), project() as (params, paths):
        from flows.gate.proposal import as_yaml, propose, write_limits

        proposals = propose(params, paths)
        if write and proposals:
            write_limits(paths.params, proposals)
        if as_json:
            print(json.dumps({"written": write and bool(proposals), "limits": [one.as_dict() for one in proposals]}))
        elif not proposals:
            print(
                "no stricter limit follows from the last run: the present ones ask for as much, or no gain is certain"
            )
        else:
            print(as_yaml(proposals))
            print(
                f"\nwritten to {paths.params}; commit it" if write else "\n`peftcore limits --write` writes these lines"
            )
