# SPDX-License-Identifier: Apache-2.0
"""`publish` and `demo`: a model for others, on the Hub or on a page."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import UsageError, print_status


FACTS_HELP = (
    "YAML file with facts for the card: description, training_data, starting_point, teacher, objective, "
    "optimizer_steps, training_time, hardware, energy, limits, example, license, name, language, datasets, "
    "base_model, tags."
)


def publish(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that save_pretrained or a training run wrote.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write: new, or of an earlier publish.")],
    repo_id: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository on the Hub; the card's snippets load it.")
    ] = None,
    results: Annotated[
        list[str] | None, options.file(help="evaluation.json of `encdec-slm evaluate`. Repeat it for several.")
    ] = None,
    bundles: Annotated[
        list[str] | None, options.folder(help="Folder of `encdec-slm export` to include. Repeat it for several.")
    ] = None,
    facts: Annotated[str | None, options.file(help=FACTS_HELP)] = None,
    leave_out: Annotated[
        list[str] | None, options.name(help="Pattern of files in MODEL that are not published. Repeat it for several.")
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Upload the folder, in one commit.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Create the repository as public, not private.")] = False,
    revision: Annotated[str | None, options.revision(help="Branch to upload to.  [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Upload as a pull request.")] = False,
    config: options.Config = None,
):
    """Build a complete repository folder from a checkpoint, check it, and upload it with --push.

    The folder has weights, configs, tokenizer or processor, every code file, a card and a license, and is checked in
    a process that has only transformers. Secrets, paths of this machine, optimizer states and pickles are refused.

    \b
    Examples:
      encdec-slm publish outputs/distill_docstrings outputs/repository --results outputs/evaluation/evaluation.json
      encdec-slm publish outputs/distill_docstrings outputs/repository --repo-id me/my-model --push
    """
    if push and repo_id is None:
        raise UsageError("--push uploads to a repository: add --repo-id OWNER/NAME.")
    if facts is not None and not Path(facts).is_file():
        raise UsageError(f"--facts is {facts!r}, but there is no such file. Give the path of a YAML file.")
    from encdec_slm.configuration import load_recipe
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
        facts=None if facts is None else load_recipe(facts),
        leave_out=leave_out or (),
    )
    if published.left_out:
        print_status(f"Left out: {', '.join(published.left_out)}.")
    if published.commit is None:
        print(f"Wrote and checked {published.folder}; nothing was uploaded. Read its README.md.")
    elif not published.is_new_commit:
        print(f"Nothing new: {published.repo_id} has all of {published.folder} in commit {published.commit}.")
    else:
        print(f"Uploaded {published.folder} to {published.pull_request_url or published.commit_url}")


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Folder of a checkpoint, or its name on the Hub.  [default: the shell model]"
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Time the decoder-only baseline too, after each answer.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65535, help="Port.  [default: the first free one from 7860]")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Let gradio open a public address.")] = False,
    revision: Annotated[str | None, options.revision(help="Commit, tag or branch whose code runs.")] = None,
    config: options.Config = None,
):
    """Serve a web page to try a model, on this machine only, until Ctrl-C.

    \b
    Examples:
      encdec-slm demo
      encdec-slm demo --model outputs/vqa_synthetic --compare --port 7861
    """
    from encdec_slm.hub_cards.space.app import serve

    from .shell_model import find_model_folder

    model = str(find_model_folder(None)) if model is None else model
    if revision is None and not Path(model).is_dir():
        print_status("No --revision: the code of the newest commit runs. Pin one that you have read.")
    serve(model, port=port, share=share, compare=compare, revision=revision)


__all__ = ["demo", "publish"]
