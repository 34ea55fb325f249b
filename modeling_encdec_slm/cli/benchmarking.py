# SPDX-License-Identifier: Apache-2.0
"""`bench` and `presets`: the family's sizes, and how fast they are beside their decoder-only twins."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .shared import Config, Debug, UsageError, examples


def bench(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="A text size; `encdec-slm presets` lists them.")
    ] = "330m",
    settings: Annotated[
        list[str], typer.Option(metavar="SOURCE:NEW", help="Source tokens and new tokens, such as 512:64; several.")
    ] = ["512:64", "2048:128"],  # noqa: B006  typer reads it
    devices: Annotated[str, typer.Option(metavar="DEVICES", help="cpu, cuda, or cpu,cuda.")] = "cpu",
    only: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="Names of contenders, such as '*/ctranslate2/*'; several.")
    ] = ["*"],  # noqa: B006
    repetitions: Annotated[int, typer.Option(metavar="N", help="Of every setting.")] = 5,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Of each engine; default: as many as torch takes.")
    ] = None,
    models: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Models for the engines, kept for a later run.")
    ] = Path("outputs/benchmark_models"),
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where benchmark.json and benchmark.png go.")] = Path(
        "outputs/benchmark"
    ),
    config: Config = None,
    debug: Debug = False,
):
    """Time a preset against its decoder-only twin, and peers, in every engine that is installed.

    Random weights, batch 1, greedy search, caches on both sides, every text of the same length. Each contender runs in
    a process of its own; those of one engine, and the twin in transformers, take turns, so that a busy moment of the
    machine hits all of them. First token: seconds from source ids to the first generated id. Decode rate: the other
    new tokens by the seconds that they take. End to end: all of it. Medians and quartiles are reported, beside what
    memory bandwidth and matrix products of this machine, measured in between, would allow.

    Prints a table per setting and which of the predecessor's claims held, and writes `benchmark.json` (with every raw
    time) and `benchmark.png`. Models for the engines are written to --models once (about 12 GB for 330m). Batches,
    beams and quality are not measured.
    """
    import torch

    from encdec_slm.benchmarks.contenders import list_contenders
    from encdec_slm.benchmarks.measuring import run_benchmark
    from encdec_slm.benchmarks.reports import figure, tables, verdict
    from encdec_slm.checkpoint_folders import write_file

    _check_preset(preset)
    threads = torch.get_num_threads() if threads is None else threads
    if repetitions < 1 or threads < 1:
        raise UsageError("A run needs at least 1 repetition and 1 thread.")
    lengths = sorted(_setting(text) for text in settings)
    contenders = list_contenders(preset, _devices(devices), only)
    report = run_benchmark(contenders, lengths, repetitions, threads, models)
    print(f"\n{tables(report)}\n\n{verdict(report)}\n")
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": " ".join(sys.argv), "preset": preset, **report}, indent=2)
    write_file(output / "benchmark.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_file(output / "benchmark.png", lambda path: figure(report).savefig(path, format="png", dpi=110))
    print(f"Wrote benchmark.json and benchmark.png to {output}")


bench.examples = examples(
    "encdec-slm bench --preset 330m --settings 512:64 2048:128",
    "encdec-slm bench --preset tiny --only '*/transformers/*' --repetitions 2",
)


def _check_preset(preset):
    from encdec_slm.configuration import list_presets

    of_text = [name for name in list_presets() if not name.endswith("-vlm")]
    if preset not in of_text:
        raise UsageError(f"--preset is {preset!r}, but a text size is needed: {', '.join(of_text)}.")


def _setting(text):
    try:
        source_length, num_new_tokens = map(int, text.split(":"))
    except ValueError:
        raise UsageError(f"--settings: {text!r} is no SOURCE:NEW, such as 512:64.") from None
    if source_length < 1 or num_new_tokens < 2:
        raise UsageError(f"--settings: {text!r} has fewer than 1 source token or 2 new tokens.")
    return source_length, num_new_tokens


def _devices(text):
    devices = text.split(",")
    if not set(devices) <= {"cpu", "cuda"}:
        raise UsageError(f"--devices: {text!r} is neither cpu, cuda nor cpu,cuda.")
    return devices


def presets(config: Config = None, debug: Debug = False):
    """Show all sizes: parameters, layers, and the bytes that one token moves, as a Markdown table."""
    from encdec_slm.configuration.sizes import preset_table

    print(preset_table())


presets.examples = examples("encdec-slm presets")

__all__ = ["bench", "presets"]
