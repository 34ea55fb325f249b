# SPDX-License-Identifier: Apache-2.0
"""`encdec-slm pretrain` over several processes and nodes: each test launches them as docs/scale.md does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from sharded_on_cpu import FSDP2

from encdec_slm.checkpoints import load_checkpoint


pytestmark = pytest.mark.slow

SHARDED = Path(__file__).with_name("sharded_on_cpu.py")
SETTINGS = {
    **{"preset": "tiny", "vocab_size": 300, "max_length": 32, "max_steps": 6, "logging_steps": 1, "save_steps": 3},
    **{"lr_scheduler_type": "constant", "learning_rate": 1e-2, "weight_decay": 0.0, "use_cpu": "true"},
    **{"optimizer": "adamw", "max_eval_samples": 20, "eval_strategy": "no", "disable_tqdm": "true"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    texts = [f"The number {number} is followed by {number + 1}." for number in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def start(corpus, folder, batch_size, *launcher, program=("-m", "encdec_slm_cli"), variables=None, **settings):
    """Start a run; `launcher` are options of torchrun, without which there is one process."""
    settings = {**SETTINGS, "per_device_train_batch_size": batch_size, **settings, "output_dir": folder}
    keys = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    command = [sys.executable, *torchrun, *map(str, program), "pretrain", "--sources", str(corpus), *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment | (variables or {}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-4000:]


def losses(folder, step=6):
    history = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(corpus, folder, 8))
    return losses(folder)


def test_two_nodes_of_two_processes_learn_what_one_process_does(corpus, alone, tmp_path):
    endpoint = f"127.0.0.1:{free_port()}"
    rendezvous = ("--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint)
    finish(*(start(corpus, tmp_path, 2, *rendezvous) for _ in range(2)))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-3)


def test_shards_of_four_processes_are_continued_by_two(corpus, alone, tmp_path):
    options = {"program": (SHARDED,), "variables": {**FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}
    finish(start(corpus, tmp_path, 2, "--nproc_per_node", "4", **options, max_steps=3))
    assert (tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0" / ".metadata").is_file()
    options["resume_from_checkpoint"] = tmp_path / "checkpoint-3"
    finish(start(corpus, tmp_path, 4, "--nproc_per_node", "2", **options))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-3)
    load_checkpoint(tmp_path)


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(corpus, alone, tmp_path):
    launcher = ("--standalone", "--nproc_per_node", "2", "--max_restarts", "1", "--monitor_interval", "0.2")
    settings = {"resume_from_checkpoint": "auto", "save_steps": 1, "max_steps": 12, "save_total_limit": 12}
    # Without it, torch 2.13 gives restarted workers the addresses of the killed ones.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launched = start(corpus, tmp_path, 4, *launcher, variables=variables, **settings)
    while not (tmp_path / "checkpoint-4" / "trainer_state.json").exists():
        assert launched.poll() is None, launched.communicate()[1][-4000:]
        time.sleep(0.05)
    os.kill(find_worker(launched.pid), signal.SIGKILL)
    _, errors = launched.communicate(timeout=600)
    assert launched.returncode == 0, errors
    (continued,) = re.findall(r"Continuing from .*checkpoint-(\d+)", errors)
    assert 4 <= int(continued) < 12
    found = losses(tmp_path, 12)
    assert found[:6] == pytest.approx(alone, rel=1e-3) and len(found) == 12


def find_worker(launcher):
    """Return the process of rank 1, the last child that torchrun has started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True).stdout
    return max(map(int, children.split()))
