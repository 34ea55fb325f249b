# SPDX-License-Identifier: Apache-2.0
"""`label`: a teacher labels a data set once, into a teacher cache."""

from typing import Annotated, Literal

import typer

from . import options
from .console import UsageError


def label(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder or name of a decoder-only model.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="JSON, CSV or Parquet file, data set on the Hub, or docstrings.")
    ],
    output: options.Output,
    distributions: Annotated[
        str | None,
        typer.Option(
            metavar="topk:K|sampled:N", help="Store the K most probable tokens of each position, or N sampled ones."
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option("--completions", help="Let the teacher generate the targets; those of the data are ignored."),
    ] = False,
    engine: Annotated[
        Literal["transformers", "ctranslate2", "vllm", "openai"],
        typer.Option(help="Runs the teacher; openai is any compatible endpoint."),
    ] = "transformers",
    source_column: Annotated[str, options.name(help="Column with the prompt.")] = "source",
    target_column: Annotated[str, options.name(help="Column with the target.")] = "target",
    split: Annotated[str, options.name(help="Split of a data set on the Hub.")] = "train",
    prompt_template: Annotated[
        str | None, options.file(help="Jinja template of the teacher's prompt, with the row's columns as fields.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Send prompts through the chat template, if the teacher has one.")] = True,
    max_new_tokens: Annotated[int, options.count(help="Maximum length of a completion, in tokens.")] = 64,
    num_completions: Annotated[int, options.count(help="Completions per row.")] = 1,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="Sampling temperature; 0 is greedy search.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the most probable tokens of this total probability.")
    ] = 1.0,
    stop: Annotated[str | None, typer.Option(metavar="TEXT", help="End completions before this text.")] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], typer.Option(help="Dtype of the weights, with --engine transformers.")
    ] = "auto",
    batch_tokens: Annotated[int, options.count(help="Maximum number of tokens per batch.")] = 2048,
    rows: Annotated[
        str | None,
        typer.Option(metavar="START:STOP", help="Label only these rows, to divide the work among machines."),
    ] = None,
    rows_per_shard: Annotated[int, options.count(help="Rows per file of the cache.")] = 256,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed.")] = 0,
    tokenizer: Annotated[
        str | None, options.folder(help="The teacher's tokenizer, for log-probabilities from an endpoint.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="URL of the endpoint. Set its key in OPENAI_API_KEY.")
    ] = None,
    requests_per_minute: Annotated[float | None, typer.Option(metavar="N", help="Rate limit of the endpoint.")] = None,
    config: options.Config = None,
):
    """Store a teacher's completions, its next-token distributions, or both, for every row of a data set.

    Distillation then needs no teacher: `encdec-slm distill --teacher_cache OUTPUT`. A run that was stopped resumes
    when the same command is given again.

    \b
    Examples:
      encdec-slm label NAME rows.jsonl outputs/labels --distributions topk:32
      encdec-slm label NAME docstrings outputs/labels --distributions topk:32    # the built-in task
      encdec-slm label NAME rows.jsonl outputs/labels --completions --stop $'\\n' --engine ctranslate2
      encdec-slm label NAME rows.jsonl outputs/labels --completions --engine openai --base-url http://localhost:8000/v1
    """
    from encdec_slm.checkpoints import check_no_overlap, find_source_folders
    from encdec_slm.trainers.prompt_templates import read_prompt_template
    from encdec_slm.trainers.teacher_cache import DistributionSpec
    from encdec_slm.trainers.teacher_engines import CompletionSettings
    from encdec_slm.trainers.teacher_labels import LabelSettings, build_engine, label_dataset, load_label_rows

    _refuse_without_effect(completions, max_new_tokens, num_completions, temperature, top_p, stop)
    if engine != "openai" and (base_url is not None or requests_per_minute is not None):
        raise UsageError("--base-url and --requests-per-minute require --engine openai.")
    try:
        spec = None if distributions is None else DistributionSpec.parse(distributions)
        generation = CompletionSettings(max_new_tokens, num_completions, temperature, top_p, stop)
        generation = generation if completions else None
        settings = LabelSettings(spec, generation, rows_per_shard=rows_per_shard, seed=seed)
        span = _parse_rows(rows)
    except ValueError as error:
        raise UsageError(str(error)) from error
    engine_options = {"batch_tokens": batch_tokens, "dtype": dtype, "tokenizer": tokenizer}
    engine_options |= {"base_url": base_url, "requests_per_minute": requests_per_minute}
    check_no_overlap(output, find_source_folders(teacher))
    runner = build_engine(engine, teacher, **engine_options)
    chat = chat and (engine == "openai" or runner.tokenizer.chat_template is not None)
    targets = None if completions else target_column
    dataset = load_label_rows(data, source_column, targets, split, prompt_template, chat)
    template = f"{chat} {read_prompt_template(prompt_template)}"
    cache = label_dataset(dataset, runner, output, settings, teacher=teacher, rows=span, prompt_template=template)
    print(f"Wrote labels to {output}." if cache is None else f"Labeled {cache.num_rows:,} rows in {output}.")


def _refuse_without_effect(completions, max_new_tokens, num_completions, temperature, top_p, stop):
    if not completions and (max_new_tokens, num_completions, temperature, top_p, stop) != (64, 1, 0.0, 1.0, None):
        raise UsageError(
            "--max-new-tokens, --num-completions, --temperature, --top-p and --stop require --completions: targets of "
            "the data are taken as they are."
        )


def _parse_rows(text):
    if text is None:
        return None
    start, separator, stop = text.partition(":")
    if not separator or not start.isdigit() or not stop.isdigit() or int(start) >= int(stop):
        raise UsageError(f"--rows must be START:STOP, such as 0:1000, got {text!r}.")
    return int(start), int(stop)


__all__ = ["label"]
