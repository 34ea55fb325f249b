# SPDX-License-Identifier: Apache-2.0
"""`evaluate`, `publish` and `demo`: what a checkpoint is worth, and how others get it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import Config, Debug, UsageError, examples, tell


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A folder that save_pretrained wrote, or a Hub name.")
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same.")] = None,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="text (rows of your own), docstrings, squad_v2, xsum, code_x_glue_ct_code_to_text, vqav2, textvqa, "
            "chartqa, digits, charts or lines.",
        ),
    ] = "docstrings",
    output_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where evaluation.json and predictions.jsonl go; a run that was stopped goes on from there.",
        ),
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data file, a folder or a Hub name; default: the task's own.")
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(metavar="NAME", help="Its configuration.")] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Its branch, tag or commit.")
    ] = None,
    dataset_split: Annotated[str | None, typer.Option(metavar="NAME", help="Default: that of the task.")] = None,
    source_column: Annotated[str, typer.Option(metavar="NAME", help="Of text and docstrings.")] = "source",
    target_column: Annotated[str, typer.Option(metavar="NAME", help="Likewise.")] = "target",
    max_samples: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows at most, drawn by --seed.")] = None,
    model_revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of MODEL on the Hub.")
    ] = None,
    max_source_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest source, in tokens; default: the model's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest answer; default: that of the model, else of the task."),
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Beams; 1 is greedy; default: those of the model.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows at once.")] = 8,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, ...; default: an accelerator where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    num_bootstrap: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often rows are drawn anew for the intervals.")
    ] = 1000,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides which rows are drawn.")] = 0,
    config: Config = None,
    debug: Debug = False,
):
    """Score a checkpoint on a task, with 95 % confidence intervals by bootstrap.

    Tasks of text: text, docstrings (Python's standard library, no download), squad_v2, xsum and
    code_x_glue_ct_code_to_text (CodeXGLUE); of images: vqav2, textvqa, chartqa, and digits, charts and lines, which
    are drawn on the spot.
    """
    given = dict(locals())
    if (model is None) == (model_option is None):
        raise UsageError("Give one MODEL: a folder that save_pretrained wrote, or a name on the Hub.")
    from encdec_slm.run_results import comparison_table, format_table
    from encdec_slm.trainers.evaluation import evaluate_checkpoint

    options = {name: given[name] for name in given if name not in ("model", "model_option", "config", "debug")}
    print(format_table(comparison_table(evaluate_checkpoint(model or model_option, **options))))
    if output_dir is not None:
        tell(f"Wrote {Path(output_dir, 'evaluation.json')}")


evaluate.examples = examples(
    "encdec-slm evaluate outputs/distill_docstrings --task docstrings --output-dir outputs/evaluation",
    "encdec-slm evaluate outputs/model --task text --dataset-name rows.jsonl --max-samples 200",
    "encdec-slm evaluate outputs/vqa_synthetic --task digits --batch-size 50",
)


def publish(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder that save_pretrained or a training run wrote.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write: new, or as publish left it.")],
    repo_id: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="On the Hub; the snippets of the card load it.")
    ] = None,
    results: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="evaluation.json of `encdec-slm evaluate`; several.")
    ] = None,
    bundles: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Of `encdec-slm export`, to go with it; several.")
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A YAML file for the card: description, training_data, teacher, objective, hardware, energy, limits, "
            "example, license, name, language, datasets, base_model, tags.",
        ),
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Names in MODEL to leave where they are; several.")
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Upload it, in one commit.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A repository that is created is not private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Where to upload to; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Upload as a pull request.")] = False,
    config: Config = None,
    debug: Debug = False,
):
    """Build a complete repository folder from a checkpoint, check it where only transformers is, and upload if asked.

    The folder has weights, configs, tokenizer or processor, every code file, a card and a licence, and loads without
    this package. Nothing is uploaded without --push. Secrets, paths of this machine, optimizer states and pickles are
    refused.
    """
    if push and repo_id is None:
        raise UsageError("--push uploads to a repository: add --repo-id OWNER/NAME.")
    from encdec_slm.hub_cards import publish

    published = publish(
        model,
        repo_id,
        output_dir=output,
        results=results or None,
        push=push,
        private=not public,
        revision=revision,
        create_pr=create_pr,
        bundles=bundles or (),
        facts=None if facts is None else _facts(facts),
        leave_out=leave_out or (),
    )
    _print_published(published)


publish.examples = examples(
    "encdec-slm publish outputs/distill_docstrings outputs/repository --results outputs/evaluation/evaluation.json",
    "encdec-slm publish outputs/distill_docstrings outputs/repository --repo-id me/my-model --push",
)


def _facts(file) -> dict[str, Any]:
    from encdec_slm.configuration.recipe_files import load_recipe

    if not Path(file).is_file():
        raise UsageError(f"--facts is {file!r}, but there is no such file. Give the path of a YAML file.")
    return load_recipe(file)


def _print_published(published):
    if published.left_out:
        tell(f"Left out: {', '.join(published.left_out)}.")
    if published.commit is None:
        print(f"Wrote and checked {published.folder}; nothing was uploaded. Look at its README.md.")
    elif not published.is_new_commit:
        print(f"Nothing new: {published.repo_id} has all of {published.folder} in commit {published.commit}.")
    else:
        print(f"Uploaded {published.folder} to {published.pull_request_url or published.commit_url}")


def demo(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Folder of a checkpoint, or its name on the Hub.")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Time it beside its decoder-only twin after each answer.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Let gradio open a public address for it.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Commit, tag or branch on the Hub, whose code runs.")
    ] = None,
    config: Config = None,
    debug: Debug = False,
):
    """Serve a page to try a model, on this machine alone, until Ctrl-C ends it."""
    from encdec_slm.hub_cards.space.app import serve

    if revision is None and not Path(model).is_dir():
        tell("No --revision: the code of the newest commit runs. Pin one that you have read.")
    serve(model, port=port, share=share, compare=compare, revision=revision)


demo.examples = examples(
    "encdec-slm demo --model outputs/distill_docstrings",
    "encdec-slm demo --model outputs/vqa_synthetic --compare --port 7861",
)

__all__ = ["demo", "evaluate", "publish"]
