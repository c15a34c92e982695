"""Nodes: which one a machine is, and that they share what they resume from."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from torch.distributed import run

from flows.errors import StageError
from flows.training import launcher, nodes
from flows.training.nodes import Node, check_shared, this_node


def test_one_node_needs_no_environment() -> None:
    assert this_node(1) is None


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("trainer-0.example.org:29500", "trainer-0.example.org", 29500), ("[fe80::1]:80", "fe80::1", 80)],
)
def test_a_node_is_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, address: str, host: str, port: int
) -> None:
    monkeypatch.setenv("PEFTCORE_NODE_RANK", "1")
    monkeypatch.setenv("PEFTCORE_MAIN_ADDRESS", address)
    assert this_node(2) == Node(1, 2, host, port)


@pytest.mark.parametrize(
    ("rank", "address"), [(None, "host:1"), ("0", None), ("2", "host:1"), ("-1", "host:1"), ("0", "host"), ("0", ":1")]
)
def test_an_environment_that_names_no_node_is_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, address: str | None
) -> None:
    for name, value in {"PEFTCORE_NODE_RANK": rank, "PEFTCORE_MAIN_ADDRESS": address}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match=r"train\.nodes is 2, but .*its number from 0 to 1 and to HOST:PORT of node 0"):
        this_node(2)


@pytest.mark.parametrize("name", ["accelerate", "torchrun"])
def test_a_launcher_hands_on_where_the_nodes_meet(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    started: list[Any] = []
    monkeypatch.setattr(run, "run", started.append)
    launcher._LAUNCHERS[name]("flows.stages.train", 2, Node(1, 3, "host", 29500))
    (given,) = started
    found = [str(getattr(given, key)) for key in ("nnodes", "node_rank", "nproc_per_node")]
    assert [*found, run.get_rdzv_endpoint(given)] == ["3", "1", "2", "host:29500"]


@pytest.mark.parametrize(
    ("found", "told"),
    [([(True, True), (True, False)], "do not share .*checkpoints"), ([(True, True), (False, True)], "different data")],
)
def test_nodes_that_would_resume_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[tuple[bool, bool]], told: str
) -> None:
    monkeypatch.setattr(nodes, "gather_object", lambda _: found)
    folder = tmp_path / "checkpoints" / "run"
    with pytest.raises(StageError, match=told.replace("different", "different parameters,")):
        check_shared(folder, PartialState(cpu=True), 2)
    assert list(folder.iterdir()) == []
