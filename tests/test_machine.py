# SPDX-License-Identifier: Apache-2.0
import os

import torch

from encdec_slm.benchmarks.machine import in_new_process, machine, matmul_rate, memory_bandwidth, peak_bytes


def test_a_new_process_is_another_one_and_counts_its_own_memory():
    held = torch.ones(2**26)  # 268 MB that the other process does not hold
    assert in_new_process(os.getpid) != os.getpid()
    assert in_new_process(peak_bytes, "cpu") < peak_bytes("cpu")
    assert held.nbytes < peak_bytes("cpu")


def test_rates_are_work_by_time(monkeypatch):
    moments = iter([1.0, 3.0, 5.0, 5.5])
    monkeypatch.setattr("encdec_slm.benchmarks.machine.time.perf_counter", lambda: next(moments))
    assert memory_bandwidth(torch.ones(1000)) == 4000 / 2
    assert matmul_rate(torch.ones(10, 10)) == 2 * 10**3 / 0.5


def test_the_machine_is_named_with_its_versions():
    named = machine("cpu")
    assert named["cpu"] and named["cores"] == os.cpu_count() and named["gpu"] is None
    assert named["torch"] == torch.__version__
