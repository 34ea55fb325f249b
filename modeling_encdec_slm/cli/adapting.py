# SPDX-License-Identifier: Apache-2.0
"""`adapt` and `convert`: checkpoints of other families become checkpoints of this one."""

from typing import Annotated

import typer

from .shared import Config, Debug, UsageError, examples
from .training import run_distill, run_finetune


TEXT = "def area(width, height):\n    return width * height"
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what lies in OUTPUT.")]


def adapt(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or Hub name of a decoder-only checkpoint.")],
    output: Output,
    encoder_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Layers of the encoder; default: its share in the split.")
    ] = None,
    decoder_layers: Annotated[int | None, typer.Option(metavar="N", help="Layers of the decoder, likewise.")] = None,
    split: Annotated[
        str, typer.Option(help="Shares of the source's layers: 2/3-1/3, 1/2-1/2 or 1/3-2/3.")
    ] = "2/3-1/3",
    strategy: Annotated[str, typer.Option(help="Which layers are kept: even or first-last.")] = "even",
    overwrite: Overwrite = False,
    distill: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Distil the source into the result, by a recipe.")
    ] = None,
    finetune: Annotated[str | None, typer.Option(metavar="RECIPE", help="Fine-tune the result, by a recipe.")] = None,
    config: Config = None,
    debug: Debug = False,
):
    """Cut an encoder-decoder from a decoder-only checkpoint, and train it on from there.

    SOURCE is of the kind of Llama (SmolLM2, TinyLlama), SmolLM3, Mistral without a sliding window, Qwen2 or Qwen3.
    Keys of the recipe of --distill or --finetune can follow as --key VALUE.
    """
    if source.startswith("-") or (ctx.args and not (distill or finetune)):
        raise UsageError(f"unrecognized arguments: {' '.join(ctx.args) or source}", ctx)
    if distill and finetune:
        raise UsageError("--distill and --finetune exclude each other: give one of them.", ctx)
    shape = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers, "split": split, "strategy": strategy}
    _adapt(source, output, overwrite, shape)
    _show(output)
    if distill or finetune:
        given = ["--config", distill or finetune, "--model_name_or_path", output]
        given += ["--teacher_model_name_or_path", source] if distill else []
        print(f"\nGoing on with: {'distill' if distill else 'finetune'} {' '.join(given + ctx.args)}\n", flush=True)
        (run_distill if distill else run_finetune)([*given, *ctx.args])


adapt.examples = examples(
    "encdec-slm adapt outputs/distill_docstrings_teacher outputs/adapted",
    "encdec-slm adapt HuggingFaceTB/SmolLM2-135M outputs/adapted --split 1/2-1/2",
    "encdec-slm adapt SOURCE outputs/adapted --distill distill_adapted --train_file rows.jsonl",
)


def _adapt(source, output, overwrite, shape):
    from encdec_slm.adaptation import from_decoder_only, load_tokenizer
    from encdec_slm.checkpoints import write_folder

    with write_folder(output, overwrite=overwrite, sources=[source]) as folder:
        tokenizer = load_tokenizer(source)
        from_decoder_only(source, tokenizer=tokenizer, **shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _show(folder):
    """Loads the result as anybody would, and says what it is."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
    config = model.config
    written = model.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=12)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    layers = f"{config.encoder_num_hidden_layers} encoder and {config.decoder_num_hidden_layers} decoder layers"
    print(
        f"{folder}: {model.num_parameters():,} parameters in {model.dtype}, {layers}.\n"
        f"Untrained, it writes for a function of two lines: {text!r}",
        flush=True,
    )


def convert(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The predecessor's model.pt (`git lfs pull` gets it).")],
    output: Output,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the tokenizer.json lies that it was trained with, or a name on the Hub; that of the released "
            "checkpoint is microsoft/Phi-3.5-mini-instruct. Without it, one that lies beside PATH is taken.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    config: Config = None,
    debug: Debug = False,
):
    """Convert a checkpoint of the predecessor, microsoft/encoder-decoder-slm, into a model folder of this family."""
    from encdec_slm.conversion import convert_reference_checkpoint

    folder = convert_reference_checkpoint(path, output, tokenizer=tokenizer, overwrite=overwrite).resolve()
    print(f"Wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}. Load it with\n")
    print(f"    AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")


convert.examples = examples("encdec-slm convert model.pt outputs/mu --tokenizer microsoft/Phi-3.5-mini-instruct")

__all__ = ["adapt", "convert"]
