# SPDX-License-Identifier: Apache-2.0
"""Measure a machine, and run contenders in processes of their own."""

import importlib
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

import encdec_slm


class Worker:
    """A process that holds one contender and times it, with its own threads and its own peak of memory.

    Args:
        name (`str`): For messages.
        load (`Callable[[], Callable]`): Called in the process; returns the function that times the contender.
        device (`str`): Whose memory is measured, `"cpu"` or `"cuda"`.
        packages (`Sequence[str]`, *optional*): Imported first, so that they do not count as memory of the model.

    Raises:
        RuntimeError: The contender cannot be loaded.
    """

    def __init__(
        self, name: str, load: Callable[[], Callable[..., list[float]]], device: str, packages: Sequence[str] = ()
    ):
        self.name, self.device = name, device
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        self.bytes_before = self._call(_load_contender, load, device, packages)

    def token_seconds(self, *task: Any) -> list[float]:
        """Return the seconds from the call until each new token is known; `task` are arguments of the function."""
        return self._call(_time_contender, *task)

    def peak_bytes(self) -> int:
        """Return the largest memory of the process so far, in bytes."""
        return self._call(peak_bytes, self.device)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)

    def _call(self, function, *args):
        try:
            return self._pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"The process of {self.name} was killed, most likely because the machine ran out of memory. Use a "
                "smaller preset or fewer contenders."
            ) from None
        except Exception as error:
            self.close()
            raise RuntimeError(f"{self.name} failed: {error}") from error


_contender = {}


def _load_contender(load, device, packages):
    # Models of random weights exceed their length, and torchao lacks kernels: neither matters here.
    transformers.logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in packages:
        importlib.import_module(name)
    bytes_before = peak_bytes(device)
    _contender["token_seconds"] = load()
    return bytes_before


def _time_contender(*task):
    return _contender["token_seconds"](*task)


def run_in_new_process(function: Callable, *args: Any) -> Any:
    """Return what `function` returns in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_bytes(device: str) -> int:
    """Return the largest memory of this process so far, in bytes: allocated on the GPU, or resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # On Linux, `getrusage` of a new process starts with the peak of its parent.
    peaks = [line for line in _read_lines("/proc/self/status") if line.startswith("VmHWM")]
    if peaks:
        return 1024 * int(peaks[0].split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bandwidth(buffer: torch.Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the bytes per second at which all threads read `buffer`, which must be larger than all caches."""
    start = clock()
    if buffer.sum().is_cuda:
        torch.cuda.synchronize()
    return buffer.numel() * buffer.itemsize / (clock() - start)


def has_bfloat16_units() -> bool:
    """Return whether this CPU multiplies bfloat16; otherwise it is far slower than float32."""
    flags = next((line for line in _read_lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and "avx512_bf16" in flags


def describe_machine(device: str) -> dict[str, Any]:
    """Return names and versions of the hardware and software that were measured."""
    models = [line for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "load_average_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, encdec_slm)},
    }


def _read_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


__all__ = [
    "Worker",
    "describe_machine",
    "has_bfloat16_units",
    "memory_bandwidth",
    "peak_bytes",
    "run_in_new_process",
]
