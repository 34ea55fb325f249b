# SPDX-License-Identifier: Apache-2.0
import os
import time
from functools import partial
from multiprocessing import get_context

import pytest
import torch

from encdec_slm.benchmarks.machine import (
    Worker,
    describe_machine,
    memory_bandwidth,
    peak_bytes,
    run_in_new_process,
)


def load_bytes(num_bytes):
    held = bytearray(num_bytes)
    return lambda *task: [os.getpid(), len(held), *task]


def fail():
    raise ValueError("There is no such model.")


@pytest.fixture(autouse=True)
def fork(monkeypatch):
    """Start processes without importing everything again; nothing here runs torch's threads."""
    monkeypatch.setattr("encdec_slm.benchmarks.machine.get_context", lambda method: get_context("fork"))


def test_a_worker_runs_in_its_own_process_and_measures_its_memory():
    worker = Worker("one", partial(load_bytes, 2**28), "cpu", ["json"])
    pid, num_held, *task = worker.token_seconds("ids", 4)
    assert pid != os.getpid() and (num_held, task) == (2**28, ["ids", 4])
    assert worker.peak_bytes() - worker.bytes_before > 0.9 * 2**28
    before = worker.peak_bytes()
    held = torch.ones(2**28)  # 1 GB, which the other process does not hold
    assert worker.peak_bytes() - before < 0.1 * held.nbytes < held.nbytes < peak_bytes("cpu")
    worker.close()


def test_a_contender_that_cannot_be_loaded_is_named_with_the_reason():
    with pytest.raises(RuntimeError, match="another failed: There is no such model"):
        Worker("another", fail, "cpu")


def test_a_killed_process_is_named_with_the_likely_reason():
    with pytest.raises(RuntimeError, match=r"last.*memory"):
        Worker("last", partial(os._exit, 1), "cpu")


def test_rates_are_positive_and_the_machine_is_described():
    assert run_in_new_process(os.getpid) != os.getpid()
    assert memory_bandwidth(torch.ones(1000)) > 0 and memory_bandwidth(torch.ones(10**6), time.process_time) > 0
    described = describe_machine("cpu")
    assert described["cpu"] and described["cores"] == os.cpu_count() and described["gpu"] is None
    assert described["torch"] == torch.__version__
