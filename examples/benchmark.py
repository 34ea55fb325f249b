# SPDX-License-Identifier: Apache-2.0
"""Times a preset against its decoder-only twin, and peers, in every engine that is installed: the proof of its speed.

    python examples/benchmark.py --preset 330m --settings 512:64 2048:128

Random weights, batch 1, greedy search, caches on both sides, every text of the same length. Each contender runs in a
process of its own; those of one engine, and the twin in transformers, take turns, so that a busy moment of the machine
hits all of them. First token: seconds from source ids to the first generated id. Decode rate: the other new tokens by
the seconds that they take. End to end: all of it. Medians and quartiles are reported, beside what memory bandwidth and
matrix products of this machine, measured in between, would allow.

Prints a table per setting and which of the predecessor's claims held, and writes `benchmark.json` (with every raw
time) and `benchmark.png`. Models for the engines are written to `--models` once (about 12 GB for `330m`). Batches,
beams and quality are not measured.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from encdec_slm.benchmarks.contenders import list_contenders
from encdec_slm.benchmarks.measuring import run_benchmark
from encdec_slm.benchmarks.reports import figure, tables, verdict
from encdec_slm.configuration import list_presets


def main():
    arguments = parse_arguments()
    contenders = list_contenders(arguments.preset, arguments.devices, arguments.only)
    report = run_benchmark(contenders, arguments.settings, arguments.repetitions, arguments.threads, arguments.models)
    print(f"\n{tables(report)}\n\n{verdict(report)}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": " ".join(sys.argv), "preset": arguments.preset, **report}, indent=2)
    write(arguments.output / "benchmark.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write(arguments.output / "benchmark.png", lambda path: figure(report).savefig(path, format="png", dpi=110))


def write(path, function):
    """Has `function` write to a temporary name first, so that an interrupted run leaves no half file."""
    temporary = path.with_name(f"{path.name}.part")
    function(temporary)
    os.replace(temporary, path)
    print(f"Wrote {path}")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name in list_presets() if not name.endswith("-vlm")]
    parser.add_argument("--preset", default="330m", choices=presets)
    parser.add_argument(
        "--settings",
        type=_setting,
        nargs="+",
        default=[(512, 64), (2048, 128)],
        metavar="SOURCE:NEW",
        help="source tokens and new tokens, such as 512:64",
    )
    parser.add_argument("--devices", type=_devices, default=["cpu"], help="cpu, cuda, or cpu,cuda")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="names of contenders, such as '*/ctranslate2/*'"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each engine")
    parser.add_argument("--models", type=Path, default=Path("outputs/benchmark_models"), help="kept for a later run")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder of the JSON and PNG")
    parsed = parser.parse_args(arguments)
    parsed.settings = sorted(parsed.settings)
    if parsed.repetitions < 1 or parsed.threads < 1:
        parser.error("a run needs at least 1 repetition and 1 thread")
    return parsed


def _setting(text):
    try:
        source_length, num_new_tokens = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no SOURCE:NEW, such as 512:64") from None
    if source_length < 1 or num_new_tokens < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has fewer than 1 source token or 2 new tokens")
    return source_length, num_new_tokens


def _devices(text):
    devices = text.split(",")
    if not set(devices) <= {"cpu", "cuda"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu, cuda nor cpu,cuda")
    return devices


if __name__ == "__main__":
    main()
