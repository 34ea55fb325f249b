# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark: contenders of one engine take turns, and the machine is measured in between."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration.sizes import num_parameters, num_weights_per_token
from ..generation_speed import decode_rate
from .contenders import BASELINE, ITEM_BYTES, OURS, TORCH_ENGINES, Contender
from .engines import find_bundle_folder, load, prepare
from .machine import Worker, describe_machine, memory_bandwidth, run_in_new_process


# More than caches hold, in numbers of 4 bytes.
NUM_BUFFER_VALUES = 2**27
NUM_WARM_UP_TOKENS = 4
MEASURES = {
    "first_token_seconds": lambda seconds: seconds[0],
    "decode_tokens_per_second": decode_rate,
    "end_to_end_seconds": lambda seconds: seconds[-1],
}


def run_benchmark(
    contenders: Sequence[Contender],
    settings: Sequence[tuple[int, int]],
    num_repetitions: int,
    num_threads: int,
    folder: Path,
    is_cpu_time: bool = False,
) -> dict[str, Any]:
    """Time contenders, and compare this family with its decoder-only baseline.

    Engine by engine, the contenders and the baseline in transformers, which is what one would run otherwise, take
    turns at every setting, so that a busy moment of the machine affects all of them.

    Args:
        contenders (`Sequence[Contender]`): See [`~encdec_slm.benchmarks.contenders.list_contenders`].
        settings (`Sequence[tuple[int, int]]`): Source tokens and new tokens, by rising source length.
        num_repetitions (`int`): Runs of every setting.
        num_threads (`int`): Threads of each engine.
        folder (`Path`): Models for the engines are written there, and found by a later run.
        is_cpu_time (`bool`, *optional*, defaults to `False`): Measure the CPU time of one thread.

    Returns:
        `dict`: `machine`, `settings`, `groups` (all raw times, by engine), `rows` (one per contender) and `pairs`
        (ratios of this family to the baseline).
    """
    for contender in contenders:
        # A run that was killed leaves a hidden folder.
        is_written = any(find_bundle_folder(contender, folder).glob("[!.]*"))
        if contender.engine not in TORCH_ENGINES and not is_written:
            print(f"Writing {contender.name}", flush=True)
            run_in_new_process(prepare, contender, folder)
    clock = time.process_time if is_cpu_time else time.perf_counter
    groups = [_measure(group, settings, num_repetitions, num_threads, folder, clock) for group in _group(contenders)]
    rows = [_build_row(contender, groups, settings, folder) for contender in contenders]
    return {
        "machine": describe_machine("cuda" if any(one.device == "cuda" for one in contenders) else "cpu"),
        "settings": [list(setting) for setting in settings],
        "is_cpu_time": is_cpu_time,
        "groups": groups,
        "rows": rows,
        "pairs": [pair for group in groups for pair in _build_pairs(group)],
    }


def _group(contenders):
    """Group contenders by device and engine, each group with the baseline in transformers first."""
    for device in dict.fromkeys(contender.device for contender in contenders):
        on_device = [contender for contender in contenders if contender.device == device]
        usual = [one for one in on_device if (one.model, one.engine) == (BASELINE, "transformers")][-1:]
        for engine in dict.fromkeys(contender.engine for contender in on_device):
            yield usual + [one for one in on_device if one.engine == engine and one not in usual]


def _measure(contenders, settings, num_repetitions, num_threads, folder, clock):
    """Time contenders that take turns; each is loaded in its own process."""
    print(f"Loading {', '.join(one.name for one in contenders)}", flush=True)
    device, names = contenders[0].device, [one.name for one in contenders]
    times = {name: [[] for _ in settings] for name in names}
    peaks, bandwidth, workers = {name: [] for name in names}, [], {}
    try:
        for one in contenders:
            packages = () if one.engine in TORCH_ENGINES else (one.engine,)
            load_one = partial(load, one, find_bundle_folder(one, folder), num_threads, clock)
            workers[one] = Worker(one.name, load_one, device, packages)
            # A compiled step is compiled again for other lengths of caches, so each setting is run once before.
            is_compiled = one.engine == "transformers-compiled"
            for length, num_new_tokens in settings if is_compiled else [(settings[0][0], NUM_WARM_UP_TOKENS)]:
                workers[one].token_seconds(_build_source(one, length), num_new_tokens)
        for repetition in range(num_repetitions):
            bandwidth.append(memory_bandwidth(torch.ones(NUM_BUFFER_VALUES, device=device), clock))
            for place, (source_length, num_new_tokens) in enumerate(settings):
                for one, worker in workers.items():
                    seconds = worker.token_seconds(_build_source(one, source_length), num_new_tokens)
                    times[one.name][place].append(seconds)
                    if repetition == 0:
                        peaks[one.name].append(worker.peak_bytes())
                    print(
                        f"{repetition + 1}/{num_repetitions} {source_length} -> {num_new_tokens} {one.name}: "
                        f"{1e3 * seconds[0]:,.0f} ms, {decode_rate(seconds):.1f} tokens/s",
                        flush=True,
                    )
    finally:
        for worker in workers.values():
            worker.close()
    bytes_before = {worker.name: worker.bytes_before for worker in workers.values()}
    return {
        **{"contenders": names, "token_seconds": times, "bandwidth": bandwidth},
        **{"bytes_before": bytes_before, "peak_bytes": peaks},
    }


def _build_source(contender, length):
    """Return random ids, the same for all contenders with one vocabulary."""
    vocab_size = contender.config.get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def _build_row(contender, groups, settings, folder):
    """Summarize one contender at every setting, beside what the memory bandwidth allows."""
    name, config = contender.name, contender.config
    groups = [group for group in groups if name in group["contenders"]]
    bandwidth = float(np.median([value for group in groups for value in group["bandwidth"]]))
    results = []
    for place, (source_length, num_new_tokens) in enumerate(settings):
        runs = [run for group in groups for run in group["token_seconds"][name][place]]
        result = {measure: spread([function(run) for run in runs]) for measure, function in MEASURES.items()}
        step_bytes = contender.step_bytes(source_length + num_new_tokens // 2)
        share = step_bytes * result["decode_tokens_per_second"]["median"] / bandwidth
        peak_bytes = max(group["peak_bytes"][name][place] for group in groups)
        facts = {"bytes_read_per_token": step_bytes, "share_of_memory_bandwidth": share, "peak_bytes": peak_bytes}
        results.append({**result, **facts})
    files = find_bundle_folder(contender, folder).rglob("*")
    return {
        "name": name,
        **{key: getattr(contender, key) for key in ("model", "engine", "precision", "device")},
        "num_parameters": num_parameters(config),
        "weights_per_token": num_weights_per_token(config),
        "file_bytes": sum(path.stat().st_size for path in files if path.is_file())
        or num_parameters(config) * ITEM_BYTES[contender.precision],
        "bytes_before": max(group["bytes_before"][name] for group in groups),
        "settings": results,
    }


def _build_pairs(group):
    """Compare this family with the baselines in the group, run by run: neighbors in time."""
    for name in group["contenders"]:
        model, _, rest = name.partition("/")
        opponents = dict.fromkeys((group["contenders"][0], f"{BASELINE}/{rest}"))
        for opponent in opponents if model == OURS else ():
            if opponent.startswith(f"{BASELINE}/") and opponent in group["contenders"]:
                yield {"ours": name, "opponent": opponent, "settings": _compare(group, name, opponent)}


def _compare(group, name, opponent):
    settings = []
    for place, runs in enumerate(zip(*(group["token_seconds"][one] for one in (name, opponent)), strict=True)):
        ratios = {
            measure: spread([function(ours) / function(other) for ours, other in zip(*runs, strict=True)])
            for measure, function in MEASURES.items()
        }
        added = [group["peak_bytes"][one][place] - group["bytes_before"][one] for one in (name, opponent)]
        settings.append({**ratios, "added_memory": added[0] / added[1]})
    return settings


__all__ = ["run_benchmark", "spread"]
