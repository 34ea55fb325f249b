# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmark: contenders take turns, engine by engine, and the machine is measured in between."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..generation_speed import decode_rate
from .contenders import OURS, TWIN, Contender, config_of, has_bfloat16_units, needs_of
from .engines import TORCH_ENGINES, bundle_folder, import_engine, load, prepare
from .machine import in_new_process, machine, matmul_rate, memory_bandwidth
from .workers import Worker


# More than caches hold, in numbers of 4 bytes.
NUM_BUFFER_VALUES = 2**27
MATRIX_SIZE = 2048
NUM_WARM_UP_TOKENS = 4


def run_benchmark(
    contenders: Sequence[Contender],
    settings: Sequence[tuple[int, int]],
    num_repetitions: int,
    num_threads: int,
    folder: Path,
) -> dict[str, Any]:
    """Times of all contenders, and what follows from them.

    Engine by engine, its contenders and the twin in transformers, which is what one would run otherwise, take turns
    at every setting, so that a busy moment of the machine hits all of them; bandwidth and matrix products of the
    machine are measured in between.

    Args:
        contenders (`Sequence[Contender]`): Of one preset; see [`~encdec_slm.benchmarks.contenders.list_contenders`].
        settings (`Sequence[tuple[int, int]]`): Numbers of source tokens and of new tokens, by rising source length.
        num_repetitions (`int`): Of every setting.
        num_threads (`int`): Of each engine.
        folder (`Path`): Where models for the engines are written, and found by a later run.

    Returns:
        `dict`: `machine`, `settings`, `groups` (every raw time, by engine), `rows` (one per contender) and `pairs`
        (ours beside the twin in the same engine and precision).
    """
    for contender in contenders:
        if contender.engine not in TORCH_ENGINES and not bundle_folder(contender, folder).exists():
            print(f"Writing {contender.name}", flush=True)
            in_new_process(prepare, contender, folder)
    groups = [_measure(group, settings, num_repetitions, num_threads, folder) for group in _groups(contenders)]
    rows = [_row(contender, groups, settings, folder) for contender in contenders]
    return {
        "machine": machine("cuda" if any(one.device == "cuda" for one in contenders) else "cpu"),
        "settings": [list(setting) for setting in settings],
        "groups": groups,
        "rows": rows,
        "pairs": [pair for group in groups for pair in _pairs(group, rows)],
    }


def usual_model(contenders: Sequence[Contender]) -> Contender | None:
    """What one would run otherwise, among contenders of one device: the twin in transformers, at its fastest."""
    twins = [one for one in contenders if (one.model, one.engine) == (TWIN, "transformers")]
    return twins[-1] if twins else None


def _groups(contenders):
    """Contenders by device and engine, each with the usual model in front."""
    for device in dict.fromkeys(contender.device for contender in contenders):
        of_device = [contender for contender in contenders if contender.device == device]
        usual = usual_model(of_device)
        for engine in dict.fromkeys(contender.engine for contender in of_device):
            group = [one for one in of_device if one.engine == engine and one != usual]
            yield [usual, *group] if usual else group


def _measure(group, settings, num_repetitions, num_threads, folder):
    """Raw times of contenders that take turns; all of them are held at once, each in its process."""
    print(f"Loading {', '.join(one.name for one in group)}", flush=True)
    machine_runs = {"bandwidth": [], **{f"matmul_{name}": [] for name in _matrices(group[0].device)}}
    workers = [_worker(contender, folder, num_threads) for contender in group]
    try:
        result = {
            "contenders": [worker.name for worker in workers],
            "bytes_before": {worker.name: worker.bytes_before for worker in workers},
            "peak_bytes": {worker.name: [] for worker in workers},
            "token_seconds": {worker.name: [[] for _ in settings] for worker in workers},
            "machine": machine_runs,
        }
        for worker, contender in zip(workers, group, strict=True):
            # A compiled step is made anew for other lengths of caches, so that each setting is run once before.
            is_compiled = contender.engine == "transformers-compiled"
            for length, num_new_tokens in settings if is_compiled else [(settings[0][0], NUM_WARM_UP_TOKENS)]:
                worker.token_seconds(_source_ids(contender, length), num_new_tokens)
        for repetition in range(num_repetitions):
            _measure_machine(machine_runs, group[0].device)
            for place, (source_length, num_new_tokens) in enumerate(settings):
                for worker, contender in zip(workers, group, strict=True):
                    name = worker.name
                    seconds = worker.token_seconds(_source_ids(contender, source_length), num_new_tokens)
                    result["token_seconds"][name][place].append(seconds)
                    if repetition == 0:
                        result["peak_bytes"][name].append(worker.peak_bytes())
                    print(
                        f"{repetition + 1}/{num_repetitions} {source_length} -> {num_new_tokens} {name}: "
                        f"{1e3 * seconds[0]:,.0f} ms, {decode_rate(seconds):.1f} tokens/s",
                        flush=True,
                    )
    finally:
        for worker in workers:
            worker.close()
    return result


def _worker(contender, folder, num_threads):
    return Worker(
        contender.name,
        partial(load, contender, bundle_folder(contender, folder), num_threads),
        contender.device,
        partial(import_engine, contender, num_threads),
    )


def _matrices(device):
    names = ["float32"] if device == "cpu" and not has_bfloat16_units() else ["float32", "bfloat16"]
    return {name: torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=getattr(torch, name), device=device) for name in names}


def _measure_machine(runs, device):
    runs["bandwidth"].append(memory_bandwidth(torch.ones(NUM_BUFFER_VALUES, device=device)))
    for name, matrix in _matrices(device).items():
        matmul_rate(matrix)
        runs[f"matmul_{name}"].append(matmul_rate(matrix))


def _source_ids(contender, length):
    """Ids of a source, the same for all contenders of one vocabulary."""
    vocab_size = config_of(contender.model, contender.preset).get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


MEASURES = {
    "first_token_seconds": lambda run: run[0],
    "decode_tokens_per_second": decode_rate,
    "end_to_end_seconds": lambda run: run[-1],
}


def _row(contender, groups, settings, folder):
    """What one contender did at every setting, beside what the machine could have done."""
    needs = needs_of(contender.config)
    of_contender = [group for group in groups if contender.name in group["contenders"]]
    bundle = bundle_folder(contender, folder)
    results = []
    for place, (source_length, num_new_tokens) in enumerate(settings):
        runs = [run for group in of_contender for run in group["token_seconds"][contender.name][place]]
        result = {name: spread([measure(run) for run in runs]) for name, measure in MEASURES.items()}
        step_bytes = needs.step_bytes(contender, source_length + num_new_tokens // 2)
        flops = needs.first_token_flops(source_length)
        bandwidth = _median(of_contender, "bandwidth")
        matmul = max(_median(of_contender, f"matmul_{name}") for name in _matrices(contender.device))
        results.append(
            result
            | {
                "bytes_read_per_token": step_bytes,
                "share_of_memory_bandwidth": step_bytes * result["decode_tokens_per_second"]["median"] / bandwidth,
                "first_token_flops": flops,
                "share_of_matmul_rate": flops / result["first_token_seconds"]["median"] / matmul,
                "peak_bytes": max(group["peak_bytes"][contender.name][place] for group in of_contender),
            }
        )
    return {
        "name": contender.name,
        **{key: getattr(contender, key) for key in ("model", "engine", "precision", "device")},
        "num_parameters": needs.num_parameters,
        "weights_per_token": needs.step_weights,
        "file_bytes": file_bytes(bundle) or needs.num_parameters * contender.item_bytes,
        "bytes_before": max(group["bytes_before"][contender.name] for group in of_contender),
        "settings": results,
    }


def file_bytes(folder: Path) -> int:
    """What the files of a folder hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _median(groups, name):
    return float(np.median([value for group in groups for value in group["machine"][name]]))


def _pairs(group, rows):
    """Ours by the usual model, and by the twin in the same engine: run by run, neighbours in time."""
    names = [row["name"] for row in rows if row["name"] in group["contenders"]]
    by_name = {row["name"]: row for row in rows}
    usual = group["contenders"][0]
    for name in names:
        row = by_name[name]
        if row["model"] != OURS:
            continue
        twin = name.replace(OURS, TWIN, 1)
        for opponent in dict.fromkeys((usual, twin)):
            if opponent in by_name and by_name[opponent]["model"] == TWIN and opponent in group["contenders"]:
                yield _pair(name, opponent, group, by_name)


def _pair(name, opponent, group, rows):
    settings = []
    for place, (ours, other) in enumerate(
        zip(*(group["token_seconds"][one] for one in (name, opponent)), strict=True)
    ):
        ratios = {
            measure: spread([function(a) / function(b) for a, b in zip(ours, other, strict=True)])
            for measure, function in MEASURES.items()
        }
        added = [group["peak_bytes"][one][place] - group["bytes_before"][one] for one in (name, opponent)]
        settings.append({**ratios, "added_memory": added[0] / added[1]})
    return {"ours": name, "opponent": opponent, "settings": settings}
