# SPDX-License-Identifier: Apache-2.0
"""What a machine is and can do, beside which a benchmark's numbers stand."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

import encdec_slm


def peak_bytes(device: str) -> int:
    """Most memory that this process has held, in bytes: allocated on the GPU, or resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # `getrusage` of a new process on Linux begins with the peak of the one that started it.
    peaks = [line for line in _lines_of("/proc/self/status") if line.startswith("VmHWM")]
    if peaks:
        return 1024 * int(peaks[0].split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_new_process(function: Callable, *args: Any) -> Any:
    """What `function` returns in a process of its own, whose memory nothing else has grown."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes per second at which all threads read `buffer`, which is larger than every cache, to sum it."""
    return buffer.numel() * buffer.itemsize / _seconds_of(buffer.sum)


def matmul_rate(matrix: torch.Tensor) -> float:
    """Floating point operations per second of a square matrix product."""
    return 2 * matrix.shape[0] ** 3 / _seconds_of(lambda: matrix @ matrix)


def _seconds_of(function):
    start = time.perf_counter()
    if function().is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> dict[str, Any]:
    """Names and versions of what the numbers hold for."""
    models = [line for line in _lines_of("/proc/cpuinfo") if line.startswith("model name")]
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


def _lines_of(path):
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
