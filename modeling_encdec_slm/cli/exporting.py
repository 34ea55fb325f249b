# SPDX-License-Identifier: Apache-2.0
"""`export`: a checkpoint for CTranslate2 or ONNX runtimes."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .adapting import Output, Overwrite
from .shared import Config, Debug, UsageError, examples


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder that save_pretrained wrote, or a name on the Hub.")
    ],
    output: Output,
    format: Annotated[
        Literal["ctranslate2", "onnx"], typer.Option(help="ctranslate2 takes text models; onnx all of them.")
    ] = "ctranslate2",
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Of ctranslate2: int8 (default), float32, int8_float32, ... Of onnx: int8, or int8_static, which "
            "measures activations now; float32 without it.",
        ),
    ] = None,
    static_lengths: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Source lengths of graphs of fixed shape, for NPUs; onnx only."),
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Compare it with the model on held-out rows of the docstring task.")
    ] = False,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="How many rows are compared.")] = 100,
    overwrite: Overwrite = False,
    config: Config = None,
    debug: Debug = False,
):
    """Export a model to CTranslate2 (CPUs, NVIDIA GPUs) or ONNX (onnxruntime, OpenVINO, browsers, NPUs).

    --agreement has the model in float32 and the export write for held-out Python functions, and prints how much of it
    is equal and the ROUGE-L of both; not for vision-text models.
    """
    if format == "ctranslate2" and static_lengths:
        raise UsageError("--static-lengths makes ONNX graphs: add --format onnx.")
    folder, precision = _write(model, output, format, quantization, static_lengths, overwrite)
    size = sum(path.stat().st_size for path in folder.iterdir())
    loader = "CT2EncDecSLM" if format == "ctranslate2" else "OrtEncDecSLM"
    print(f"Wrote {size / 1e6:,.1f} MB in {precision} to {folder}. Load it with\n")
    print(f"    {loader}.from_pretrained({str(folder)!r})", flush=True)
    if agreement:
        _print_agreement(model, folder, loader, rows, static_lengths)


export.examples = examples(
    "encdec-slm export outputs/distill_docstrings outputs/ct2",
    "encdec-slm export outputs/distill_docstrings outputs/onnx --format onnx --quantization int8 --agreement",
    "encdec-slm export outputs/distill_docstrings outputs/npu --format onnx --static-lengths 64 256",
)


def _write(model, output, form, quantization, static_lengths, overwrite) -> tuple[Path, str]:
    """The folder of the export, and in which numbers its weights are."""
    if form == "ctranslate2":
        from encdec_slm.export import export_ctranslate2

        quantization = quantization or "int8"
        return export_ctranslate2(model, output, quantization, overwrite=overwrite).resolve(), quantization
    from encdec_slm.export import export_onnx

    options = {"quantization": quantization, "static_lengths": static_lengths or None, "overwrite": overwrite}
    return export_onnx(model, output, **options).resolve(), quantization or "float32"


def _print_agreement(model, folder, loader, num_rows, static_lengths):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from encdec_slm import export
    from encdec_slm.trainers.engine_agreement import agreement
    from encdec_slm.trainers.tasks.docstrings import build_docstring_task

    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForSeq2SeqLM.from_pretrained(model, dtype="float32").eval()
    # Not of the test split: rows of that calibrate ONNX graphs.
    rows = build_docstring_task()["validation"].shuffle(seed=0)
    if static_lengths:
        rows = rows.filter(lambda row: len(tokenizer(row["source"])["input_ids"]) <= max(static_lengths))
    rows = rows.select(range(min(num_rows, len(rows))))
    exported = getattr(export, loader).from_pretrained(folder)
    scores = agreement(original, exported, tokenizer, rows["source"], rows["target"])
    engine = exported.translator.compute_type if loader == "CT2EncDecSLM" else "the export"
    print(f"\nOn {len(rows)} held-out rows of the docstring task, beside the model in float32:")
    print(f"  equal tokens      {scores['token_match']:6.2f} %")
    print(f"  equal targets     {scores['exact_match']:6.2f} %")
    print(f"  ROUGE-L           {scores['rougeL_exported']:6.2f} in {engine}, {scores['rougeL_model']:.2f} in float32")


__all__ = ["export"]
