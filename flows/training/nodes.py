"""Training on several machines: this machine's place among them, and the check that all share the checkpoints.

`train.nodes` is the number of machines. Each starts its own train stage with the same parameters, data and base, and

    PEFTCORE_NODE_RANK      its number from 0; only node 0 writes results
    PEFTCORE_MAIN_ADDRESS   HOST:PORT of node 0, where the nodes connect
"""

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from flows.errors import StageError

RANK, ADDRESS = "PEFTCORE_NODE_RANK", "PEFTCORE_MAIN_ADDRESS"


@dataclass(frozen=True)
class Node:
    """One machine of several. rank: from 0; host, port: address of node 0."""

    rank: int
    nodes: int
    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """True if node 0's address is this machine itself."""
        return self.host in ("localhost", "127.0.0.1", "::1")


def this_node(nodes: int) -> Node | None:
    """Return this machine's place among `nodes`, from the environment; None if there is only one machine.

    Raises:
        StageError: An environment variable is missing or invalid.
    """
    if nodes == 1:
        return None
    rank, address = os.environ.get(RANK, ""), os.environ.get(ADDRESS, "")
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d{1,5})", address)
    if not re.fullmatch(r"\d{1,5}", rank) or int(rank) >= nodes or match is None:
        raise StageError(
            f"train.nodes is {nodes}, but {RANK} is {rank!r} and {ADDRESS} is {address!r}: set them on each node, to "
            f"its number from 0 to {nodes - 1} and to HOST:PORT of node 0"
        )
    return Node(int(rank), nodes, match[1], int(match[2]))


def check_shared(folder: Path, processes: PartialState, nodes: int) -> None:
    """Check that all nodes see the run's folder of checkpoints, from which each resumes.

    Raises:
        StageError: In every process, if a node has another run or does not see the folder.
    """
    if nodes == 1:
        return
    mark: list[str] = [secrets.token_hex(8), folder.name]
    broadcast_object_list(mark)
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark[0]).touch()
    processes.wait_for_everyone()
    # a new random name, because a network file system may cache the absence of a known one
    answers = gather_object([(mark[1] == folder.name, (folder / mark[0]).exists())])
    if processes.is_main_process:
        (folder / mark[0]).unlink()
    if not all(same for same, _ in answers):
        raise StageError("the nodes train on different parameters, data or bases; give all nodes the same")
    if not all(seen for _, seen in answers):
        raise StageError(f"the nodes do not share {folder.parent}; put that folder on a file system that all have")
