# SPDX-License-Identifier: Apache-2.0
"""`evaluate`, `bench` and `presets`: quality, speed and sizes of models."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options
from .console import UsageError, print_status


TASK_HELP = (
    "text (your own rows), docstrings, shell, squad_v2, xsum, code_x_glue_ct_code_to_text, vqav2, textvqa, chartqa, "
    "digits, charts or lines."
)


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder that save_pretrained wrote, or a name on the Hub.")
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same.")] = None,
    task: Annotated[str, typer.Option(metavar="TASK", help=TASK_HELP)] = "docstrings",
    output_dir: Annotated[
        str | None,
        options.folder(help="For evaluation.json and predictions.jsonl. An interrupted run continues there."),
    ] = None,
    dataset_name: Annotated[
        str | None, options.name(help="File, folder or Hub data set.  [default: the task's]")
    ] = None,
    dataset_config: Annotated[str | None, options.name(help="Configuration of the data set.")] = None,
    dataset_revision: Annotated[str | None, options.revision(help="Branch, tag or commit of the data set.")] = None,
    dataset_split: Annotated[str | None, options.name(help="Split of the data set.  [default: the task's]")] = None,
    source_column: Annotated[str, options.name(help="For text and docstrings.")] = "source",
    target_column: Annotated[str, options.name(help="For text and docstrings.")] = "target",
    max_samples: Annotated[int | None, options.count(help="Use at most N random rows.")] = None,
    model_revision: Annotated[str | None, options.revision(help="Branch, tag or commit of MODEL on the Hub.")] = None,
    max_source_length: Annotated[
        int | None, options.count(help="Longest source, in tokens.  [default: the model's]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, options.count(help="Longest output, in tokens.  [default: the model's or task's]")
    ] = None,
    num_beams: Annotated[
        int | None, options.count(help="Beam search; 1 is greedy search.  [default: the model's]")
    ] = None,
    prompt_template: Annotated[
        str | None, options.name(help="Jinja text or file with {{ source }}, for a decoder-only MODEL.")
    ] = None,
    batch_size: Annotated[int, options.count(help="Rows per batch.")] = 8,
    device: Annotated[
        str | None, options.name(help="cpu, cuda, ...  [default: an accelerator if there is one]")
    ] = None,
    dtype: Annotated[str | None, options.name(help="float32, bfloat16 or float16.  [default: as saved]")] = None,
    num_bootstrap: Annotated[int, options.count(help="Resamples for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of --max-samples and the intervals.")] = 0,
    config: options.Config = None,
):
    """Score a checkpoint on a task, with 95 % confidence intervals by bootstrap.

    Text tasks: text, docstrings (Python's standard library, no download), shell (with --dataset-name), squad_v2, xsum
    and code_x_glue_ct_code_to_text (CodeXGLUE). Image tasks: vqav2, textvqa, chartqa, and digits, charts and lines,
    whose images are drawn by this package.

    \b
    Examples:
      encdec-slm evaluate outputs/distill_docstrings --task docstrings --output-dir outputs/evaluation
      encdec-slm evaluate outputs/model --task text --dataset-name rows.jsonl --max-samples 200
      encdec-slm evaluate outputs/vqa_synthetic --task digits --batch-size 50
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "model_option", "config")}
    if (model is None) == (model_option is None):
        raise UsageError("Give one MODEL: a folder that save_pretrained wrote, or a name on the Hub.")
    from encdec_slm.run_results import comparison_table, format_table
    from encdec_slm.trainers.evaluation import evaluate_checkpoint

    print(format_table(comparison_table(evaluate_checkpoint(model or model_option, **arguments))))
    if output_dir is not None:
        print_status(f"Wrote {Path(output_dir, 'evaluation.json')}")


def bench(
    preset: Annotated[str, options.name(help="A size for text; `encdec-slm presets` lists them.")] = "330m",
    settings: Annotated[
        list[str], typer.Option(metavar="SOURCE:NEW", help="Source tokens and new tokens. Repeat it for several.")
    ] = ["512:64", "2048:128"],  # noqa: B006  typer reads it
    devices: Annotated[Literal["cpu", "cuda", "cpu,cuda"], typer.Option(help="Where the models run.")] = "cpu",
    only: Annotated[
        list[str], options.name(help="Pattern of contenders, such as '*/ctranslate2/*'. Repeat it for several.")
    ] = ["*"],  # noqa: B006
    repetitions: Annotated[int, options.count(help="Runs of every setting.")] = 5,
    threads: Annotated[int | None, options.count(help="Threads of each engine.  [default: torch's]")] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Measure the CPU time of one thread, on a machine that is busy.")
    ] = False,
    models: Annotated[Path, options.folder(help="For models of the engines, which a later run finds there.")] = Path(
        "outputs/benchmark_models"
    ),
    output: Annotated[Path, options.folder(help="For benchmark.json and benchmark.png.")] = Path("outputs/benchmark"),
    config: options.Config = None,
):
    """Time a preset and its decoder-only baseline, and peers, in every engine that is installed.

    Random weights, batch 1, greedy search, caches on both sides, all texts of the same length. Each contender runs in
    its own process; those of one engine, and the baseline in transformers, take turns, so that a busy moment of the
    machine affects all of them. First token: seconds from source ids to the first generated id. Decode rate: the
    other new tokens per second. End to end: everything. Medians and quartiles are reported, and the share of the
    memory bandwidth that is used, which is measured in between.

    Prints a table per setting and which of the paper's claims held, and writes benchmark.json (with every raw
    time) and benchmark.png. Models for the engines are written to --models once (about 12 GB for 330m). Batches,
    beams and quality are not measured.

    \b
    Examples:
      encdec-slm bench --preset 330m --settings 512:64 --settings 2048:128
      encdec-slm bench --preset tiny --only '*/transformers/*' --repetitions 2
    """
    import torch

    from encdec_slm.benchmarks.contenders import list_contenders
    from encdec_slm.benchmarks.measuring import run_benchmark
    from encdec_slm.benchmarks.reports import build_figure, build_tables, build_verdict
    from encdec_slm.checkpoints import write_file

    _check_preset(preset)
    _check_output(output)
    if cpu_time and (devices != "cpu" or threads not in (None, 1)):
        raise UsageError("--cpu-time is for one thread on the CPU: leave out --devices, and set --threads to 1.")
    threads = 1 if cpu_time else threads or torch.get_num_threads()
    lengths = sorted(_parse_setting(text) for text in settings)
    contenders = list_contenders(preset, devices.split(","), only)
    output.mkdir(parents=True, exist_ok=True)  # before hours of measurements that could not be written
    report = run_benchmark(contenders, lengths, repetitions, threads, models, cpu_time)
    print(f"\n{build_tables(report)}\n\n{build_verdict(report)}\n")
    text = json.dumps({"command": " ".join(sys.argv), "preset": preset, **report}, indent=2)
    write_file(output / "benchmark.json", text + "\n")
    write_file(output / "benchmark.png", lambda path: build_figure(report).savefig(path, format="png", dpi=110))
    print(f"Wrote benchmark.json and benchmark.png to {output}")


def _check_preset(preset):
    from encdec_slm.configuration import list_presets

    text_presets = [name for name in list_presets() if not name.endswith("-vlm")]
    if preset not in text_presets:
        raise UsageError(f"--preset is {preset!r}, but must be one of {', '.join(text_presets)}.")


def _check_output(folder):
    """Only files of an earlier benchmark are replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output is {str(folder)!r}, which is a file. Give the path of a folder.")
    files = [folder / name for name in ("benchmark.json", "benchmark.png") if (folder / name).exists()]
    try:
        is_benchmark = "groups" in json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        is_benchmark = False
    if files and not is_benchmark:
        raise ValueError(f"{files[0]} is not from an earlier benchmark, and would be replaced. Give another --output.")


def _parse_setting(text):
    try:
        source_length, num_new_tokens = map(int, text.split(":"))
    except ValueError:
        raise UsageError(f"--settings is {text!r}, but must be SOURCE:NEW, such as 512:64.") from None
    if source_length < 1 or num_new_tokens < 2:
        raise UsageError(f"--settings is {text!r}, but needs at least 1 source token and 2 new tokens.")
    return source_length, num_new_tokens


def presets(config: options.Config = None):
    """Show all sizes as a Markdown table: parameters, layers, and the bytes that one token moves.

    \b
    Examples:
      encdec-slm presets
    """
    from encdec_slm.configuration.sizes import preset_table

    print(preset_table())


__all__ = ["bench", "evaluate", "presets"]
