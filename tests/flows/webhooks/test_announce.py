"""Announcements: kill -9 at any moment loses no event, makes none up, and repeats none under another id."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from webhook_receiver import Receiver

from flows.errors import RepositoryError
from flows.params import Params
from flows.runtime.git import Git
from flows.runtime.locks import exclusive
from flows.webhooks import Event, TagProof, announced, try_to_announce
from flows.webhooks.delivery import deliver
from flows.webhooks.outbox import Outbox, outbox_path

Make = Callable[..., Params]
TAG = """
import os, signal, subprocess, sys
from pathlib import Path
from flows.params import Params
from flows.runtime.git import Git
from flows.webhooks import Event, TagProof, announced, delivery, outbox

root, url, moment, numbers = Path(sys.argv[1]), sys.argv[2], sys.argv[3], range(int(sys.argv[4]), int(sys.argv[5]))
params, git = Params.model_validate({"webhooks": {"endpoints": [{"url": url}]}}), Git(root)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "as git begins":
    run_command = subprocess.run
    def run_or_die(command, **options):
        if "tag" in command:
            subprocess.Popen.communicate = die
        return run_command(command, **options)
    subprocess.run = run_or_die
if moment == "after the tag":
    outbox.Outbox.confirm = die
if moment == "before it is sent":
    delivery._post = die
if moment == "after it is sent":
    outbox.Outbox.note_delivered = die
for number in numbers:
    event = Event("promotion", "docs", f"docs#champion#{number}", {"tag": number})
    with announced(params, root, event, TagProof(f"docs#champion#{number}", f"number {number}")):
        if moment == "before the tag":
            die()
        git.create_tag(f"docs#champion#{number}", "HEAD", f"number {number}", after=0)
"""


def run(repository: Path, url: str, moment: str, first: int, end: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", TAG, str(repository), url, moment, str(first), str(end)]
    return subprocess.Popen(command, env=dict(os.environ))


def tags(repository: Path) -> set[str]:
    return {tag.name for tag in Git(repository).tags("docs#champion#*")}


def wait_for_git(repository: Path) -> None:
    """Wait until a git command that outlives its killed process has ended."""
    with exclusive(Outbox(outbox_path(repository)).lock):
        pass


def announcements(receiver: Receiver) -> list[str]:
    return [f"docs#champion#{one['data']['tag']}" for one in receiver.accepted.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "has_tag", "requests"),
    [
        ("before the tag", False, 0),
        ("as git begins", True, 1),
        ("after the tag", True, 1),
        ("before it is sent", True, 1),
        ("after it is sent", True, 2),
    ],
)
def test_kill_9_at_each_moment(
    repository: Path, receiver: Receiver, params_of: Make, moment: str, has_tag: bool, requests: int
) -> None:
    assert run(repository, receiver.url, moment, 1, 2).wait(60) == -9
    wait_for_git(repository)
    deliver(params_of(), repository)
    assert tags(repository) == ({"docs#champion#1"} if has_tag else set())
    assert set(announcements(receiver)) == tags(repository) and len(receiver.requests) == requests
    assert len(receiver.accepted) == has_tag  # one id, however often it was sent
    outbox = Outbox(outbox_path(repository))
    assert outbox.waiting() == [] and outbox.unproven() == {}
    # the work is done again after the crash
    assert run(repository, receiver.url, "never", 1 + has_tag, 3).wait(60) == 0
    assert sorted(announcements(receiver)) == ["docs#champion#1", "docs#champion#2"]


@pytest.mark.slow
def test_kill_9_at_random_moments(repository: Path, receiver: Receiver, params_of: Make) -> None:
    chance = random.Random(7)
    for _ in range(15):
        first = 1 + max((int(tag.rpartition("#")[2]) for tag in tags(repository)), default=0)
        process = run(repository, receiver.url, "never", first, first + 1000)
        until = time.monotonic() + 60
        while len(tags(repository)) < first and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.wait(10)
        wait_for_git(repository)
    deliver(params_of(), repository, at_once=True)
    assert len(tags(repository)) >= 15
    assert sorted(announcements(receiver)) == sorted(tags(repository))


def test_a_tag_that_is_not_created_is_not_announced(repository: Path, receiver: Receiver, params_of: Make) -> None:
    event = Event("promotion", "docs", "docs#champion#1", {})
    with (
        pytest.raises(ZeroDivisionError),
        announced(params_of(), repository, event, TagProof("docs#champion#1", "mine")),
    ):
        raise ZeroDivisionError
    Git(repository).create_tag("docs#champion#1", "HEAD", "another writer's", after=0)
    deliver(params_of(), repository)
    assert receiver.requests == [] and Outbox(outbox_path(repository)).unproven() == {}


def test_an_announcement_in_progress_is_left_alone(repository: Path, receiver: Receiver, params_of: Make) -> None:
    event = Event("promotion", "docs", "docs#champion#1", {"tag": 1})
    with announced(params_of(), repository, event, TagProof("docs#champion#1", "mine")):
        deliver(params_of(), repository)  # another process, before the tag
        assert list(Outbox(outbox_path(repository)).unproven()) == [event.id]
        Git(repository).create_tag("docs#champion#1", "HEAD", "mine", after=0)
    assert announcements(receiver) == ["docs#champion#1"]


def test_a_tag_that_a_remote_has_to_accept_is_announced_once_the_remote_has_it(
    repository: Path, tmp_path: Path, receiver: Receiver, params_of: Make
) -> None:
    remote, git, params = tmp_path / "remote", Git(repository), params_of()
    git.run("init", "--bare", "--quiet", str(remote))
    event = Event("promotion", "docs", "docs#champion#1", {"tag": 1})
    proof = TagProof("docs#champion#1", "mine", str(remote))
    Outbox(outbox_path(repository)).add(event, [receiver.url], proof)  # as a process that was killed before its push
    git.create_tag("docs#champion#1", "HEAD", "mine", after=0)
    deliver(params, repository)
    assert receiver.requests == []
    remote.rename(tmp_path / "away")
    deliver(params, repository)
    assert receiver.requests == [] and list(Outbox(outbox_path(repository)).unproven()) == [event.id]
    (tmp_path / "away").rename(remote)
    git.push_tags(str(remote), ["docs#champion#1"])
    deliver(params, repository)
    assert announcements(receiver) == ["docs#champion#1"]


def test_if_the_outbox_cannot_be_written_nothing_happens(
    repository: Path, params_of: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (repository / "file").touch()
    monkeypatch.setenv("PEFTCORE_OUTBOX", str(repository / "file" / "outbox"))
    event, entered = Event("promotion", "docs", "1", {}), False
    with (
        pytest.raises(RepositoryError, match="the outbox of webhooks"),
        announced(params_of(), repository, event, TagProof("a", "b")),
    ):
        entered = True
    assert not entered
    try_to_announce(params_of(), repository, event)
    assert "promotion was not announced: the outbox of webhooks" in caplog.text
