"""An attribute of its own for each thread: what another sees, what copies have."""

import copy
import pickle
import threading
from typing import Any

from torch import nn

from peftcore._util.per_thread import PerThread


class Holder(nn.Module):
    value = PerThread({})
    other = PerThread(0)


def in_a_thread(work: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_each_thread_has_its_own_and_a_new_one_the_last() -> None:
    holder = Holder()
    assert holder.value == {} and holder.other == 0
    holder.value = {"here": 1}
    assert in_a_thread(lambda: holder.value) == {"here": 1}  # it has set none, so the last one that was

    def set_there() -> Any:
        holder.value = {"there": 2}
        return holder.value

    assert in_a_thread(set_there) == {"there": 2} and holder.value == {"here": 1}
    assert in_a_thread(lambda: holder.value) == {"there": 2} and holder.other == 0


def test_copies_have_the_default() -> None:
    holder = Holder()
    holder.value, holder.other = {"here": 1}, 3
    for copied in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert copied.value == {} and copied.other == 0
        copied.other = 5
    assert holder.value == {"here": 1} and holder.other == 3
