"""Training on several machines: which of them this one is, and whether they see the same checkpoints.

`train.nodes` says how many; each starts its own train stage, with the same parameters, data and base, and

    PEFTCORE_NODE_RANK      which one it is, from 0; only node 0 writes results
    PEFTCORE_MAIN_ADDRESS   HOST:PORT of node 0, where they meet
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
    """One machine of several. rank: from 0; host, port: of node 0."""

    rank: int
    nodes: int
    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether the nodes meet on this very machine."""
        return self.host in ("localhost", "127.0.0.1", "::1")


def this_node(nodes: int) -> Node | None:
    """Which of `nodes` this machine is, by its environment; None where there is but one. Raises StageError."""
    if nodes == 1:
        return None
    rank, address = os.environ.get(RANK, ""), os.environ.get(ADDRESS, "")
    met = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d{1,5})", address)
    if not re.fullmatch(r"\d{1,5}", rank) or int(rank) >= nodes or met is None:
        raise StageError(
            f"train.nodes is {nodes}, but {RANK} is {rank!r} and {ADDRESS} is {address!r}: set them on each node, to "
            f"its number from 0 to {nodes - 1} and to HOST:PORT of node 0"
        )
    return Node(int(rank), nodes, met[1], int(met[2]))


def check_shared(folder: Path, processes: PartialState, nodes: int) -> None:
    """Refuse nodes that do not see the same run's folder of checkpoints, since each resumes from what it finds there.

    Raises StageError, in every process.
    """
    if nodes == 1:
        return
    mark: list[str] = [secrets.token_hex(8), folder.name]
    broadcast_object_list(mark)
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark[0]).touch()
    processes.wait_for_everyone()
    # a file never asked for before is one that a network file system does not remember as absent
    found = gather_object([(mark[1] == folder.name, (folder / mark[0]).exists())])
    if processes.is_main_process:
        (folder / mark[0]).unlink()
    if not all(same for same, _ in found):
        raise StageError("the nodes train on different parameters, data or bases; give all the same")
    if not all(seen for _, seen in found):
        raise StageError(f"the nodes do not share {folder.parent}; put that folder on a file system that all have")
