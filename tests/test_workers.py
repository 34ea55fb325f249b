# SPDX-License-Identifier: Apache-2.0
import os
from functools import partial

import pytest

from encdec_slm.benchmarks.workers import Worker


def hold(num_bytes):
    held = bytearray(num_bytes)

    def seconds(*task):
        return [os.getpid(), len(held), *task]

    return seconds


def fail():
    raise ValueError("There is no such model.")


def test_a_worker_answers_from_a_process_of_its_own_whose_memory_it_counts():
    worker = Worker("one", partial(hold, 2**28), "cpu")
    try:
        pid, num_held, *task = worker.token_seconds("ids", 4)
        assert (pid, num_held, task) == (worker._process.pid, 2**28, ["ids", 4]) and pid != os.getpid()
        assert worker.peak_bytes() - worker.bytes_before > 0.9 * 2**28
    finally:
        worker.close()
    assert not worker._process.is_alive()


def test_a_contender_that_cannot_be_loaded_is_named_with_the_reason():
    with pytest.raises(RuntimeError, match=r"another failed: There is no such model\."):
        Worker("another", fail, "cpu")


def test_a_process_that_ends_is_told_of_with_what_it_may_have_been():
    with pytest.raises(RuntimeError, match="last ended without an answer: most likely the machine ran out of memory"):
        Worker("last", partial(os._exit, 1), "cpu")
