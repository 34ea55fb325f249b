# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from encdec_slm.benchmarks.contenders import OURS, Contender
from encdec_slm.benchmarks.workers import Worker


def test_a_worker_times_in_a_process_of_its_own(tmp_path):
    worker = Worker(Contender(OURS, "transformers", "float32", "cpu", "tiny"), tmp_path, 1)
    try:
        assert worker._process.pid != os.getpid()
        assert len(worker.token_seconds([5, 6, 7], 4)) == 4
        assert worker.peak_bytes() >= worker.bytes_before > 0
    finally:
        worker.close()
    assert not worker._process.is_alive()


def test_a_contender_that_cannot_be_loaded_is_named_with_the_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"encoder-decoder/ctranslate2/int8/cpu failed"):
        Worker(Contender(OURS, "ctranslate2", "int8", "cpu", "tiny"), tmp_path / "nothing", 1)
