# SPDX-License-Identifier: Apache-2.0
"""`adapt`, `convert` and `export`: checkpoints of other kinds become checkpoints of this family, and these exports."""

import json
from typing import Annotated, Literal

import typer

from .console import Config, Output, Overwrite, UsageError, print_status
from .training import run_distill, run_finetune


def adapt(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or Hub name of a decoder-only checkpoint.")],
    output: Output,
    encoder_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Layers of the encoder.  [default: its share in --split]")
    ] = None,
    decoder_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Layers of the decoder.  [default: its share in --split]")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Shares of the source's layers: 2/3-1/3, 1/2-1/2 or 1/3-2/3.")
    ] = "2/3-1/3",
    strategy: Annotated[
        str, typer.Option(help="Which layers are copied: outer, even or first-last; docs/adapt.md compares them.")
    ] = "outer",
    trim_vocabulary: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="Keep only the tokens that these rows use: a JSON, CSV or Parquet file."),
    ] = None,
    vocabulary_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --trim-vocabulary: keep only the N most frequent.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="Print the loss before training on these rows, a file likewise."),
    ] = None,
    overwrite: Overwrite = False,
    distill: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Then distill SOURCE into the result, by this recipe.")
    ] = None,
    finetune: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Then fine-tune the result, by this recipe.")
    ] = None,
    config: Config = None,
):
    """Make an encoder-decoder from the layers of a decoder-only checkpoint, and optionally train it.

    SOURCE is a Llama (SmolLM2, TinyLlama), SmolLM3, Mistral without a sliding window, Qwen2 or Qwen3. Keys of the
    recipe of --distill or --finetune can follow as --key VALUE.

    \b
    Examples:
      encdec-slm adapt outputs/distill_docstrings_teacher outputs/adapted
      encdec-slm adapt HuggingFaceTB/SmolLM2-135M outputs/adapted --split 1/2-1/2
      encdec-slm adapt SOURCE outputs/adapted --trim-vocabulary rows.jsonl --vocabulary-size 8000
      encdec-slm adapt SOURCE outputs/adapted --distill distill_adapted --train_file rows.jsonl
    """
    if source.startswith("-") or (ctx.args and not (distill or finetune)):
        raise UsageError(f"No such option: {(ctx.args or [source])[0]}", ctx)
    if distill and finetune:
        raise UsageError("--distill and --finetune are both given, but only one can follow.", ctx)
    if vocabulary_size and not trim_vocabulary:
        raise UsageError("--vocabulary-size requires --trim-vocabulary ROWS.", ctx)
    shape = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers, "split": split, "strategy": strategy}
    _write_adapted(source, output, overwrite, shape, trim_vocabulary, vocabulary_size, calibration)
    if distill or finetune:
        arguments = ["--config", distill or finetune, "--model_name_or_path", output]
        arguments += ["--teacher_model_name_or_path", source] if distill else []
        (run_distill if distill else run_finetune)([*arguments, *ctx.args])


def _write_adapted(source, output, overwrite, shape, rows, vocabulary_size, calibration):
    from encdec_slm.adaptation import from_decoder_only, load_tokenizer
    from encdec_slm.checkpoints import write_folder
    from encdec_slm.vocabulary import describe_embeddings

    calibration_rows = None if calibration is None else _read_rows(calibration)
    with write_folder(output, overwrite=overwrite, sources=[source]) as folder:
        tokenizer = load_tokenizer(source)
        if rows is not None:
            tokenizer = _trim_to_rows(tokenizer, rows, vocabulary_size)
        model = from_decoder_only(source, tokenizer=tokenizer, **shape)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = model.config
    layers = f"{config.encoder_num_hidden_layers} encoder and {config.decoder_num_hidden_layers} decoder layers"
    print(f"Wrote {model.num_parameters():,} parameters in {model.dtype}, {layers}, to {output}.", flush=True)
    if rows is not None:
        print(describe_embeddings(model, tokenizer), flush=True)
    if calibration is not None:
        print(_describe_loss(model, tokenizer, calibration_rows), flush=True)


def _read_rows(path):
    from encdec_slm.trainers.data_files import read_data_file

    rows = list(read_data_file(path, "calibration"))
    if not rows:
        raise ValueError(f"`calibration` is {path!r}, which has no rows. Give a file with sources and targets.")
    return rows


def _describe_loss(model, tokenizer, rows, batch_size=8):
    import math

    import torch

    from encdec_slm.trainers.row_encoding import RowEncoder

    encoder, total, num_tokens = RowEncoder(tokenizer), 0.0, 0
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            batch = encoder.collate(rows[first : first + batch_size])
            if "labels" not in batch:
                raise ValueError("The rows of `calibration` have no targets. Give rows with sources and targets.")
            count = int((batch["labels"] >= 0).sum())
            total, num_tokens = total + count * model(**batch).loss.item(), num_tokens + count
    return (
        f"Loss before training: {total / num_tokens:.2f} nats per target token on {len(rows):,} rows; guessing evenly "
        f"has {math.log(model.config.vocab_size):.2f}."
    )


def _trim_to_rows(tokenizer, rows, vocabulary_size):
    from encdec_slm.trainers.data_files import read_data_file
    from encdec_slm.trainers.row_encoding import iterate_texts
    from encdec_slm.vocabulary import trim_tokenizer

    texts = iterate_texts(read_data_file(rows, "trim_vocabulary"))
    return trim_tokenizer(tokenizer, texts, max_size=vocabulary_size)[0]


def convert(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The predecessor's model.pt (`git lfs pull` gets it).")],
    output: Output,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder or Hub name of the tokenizer that the checkpoint was trained with; "
            "microsoft/Phi-3.5-mini-instruct for the released one.  [default: the one beside PATH]",
        ),
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Fields of the predecessor's config that the checkpoint does not state."),
    ] = None,
    overwrite: Overwrite = False,
    config: Config = None,
):
    """Convert a checkpoint of the predecessor, microsoft/encoder-decoder-slm, into a folder of this family.

    \b
    Examples:
      encdec-slm convert model.pt outputs/mu --tokenizer microsoft/Phi-3.5-mini-instruct
      encdec-slm convert model.pt outputs/mu --model-config '{"n_head": 6, "n_kv_head": 3, "is_interleaved": true}'
    """
    from encdec_slm.conversion import convert_reference_checkpoint
    from encdec_slm.hub_cards.model_cards import write_card

    fields = None if model_config is None else _json_object("--model-config", model_config)
    folder = convert_reference_checkpoint(
        path, output, tokenizer=tokenizer, model_config=fields, overwrite=overwrite
    ).resolve()
    write_card(folder, converted=True)
    print(f"Wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}. Load it with\n")
    print(f"    AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")


def _json_object(option, text):
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{option} is {text}, but must be a JSON object.")
    return fields


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that save_pretrained wrote, or a name on the Hub.")
    ],
    output: Output,
    format: Annotated[
        Literal["ctranslate2", "onnx"], typer.Option(help="ctranslate2 is for text models, onnx for all.")
    ] = "ctranslate2",
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="ctranslate2: int8 (default), float32, int8_float32, ...; onnx: int8, or int8_static with activation "
            "ranges measured now.  [default for onnx: float32]",
        ),
    ] = None,
    static_lengths: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Source length of an ONNX graph of fixed shape, for NPUs. Repeat it."),
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Compare the export with the model on held-out docstring rows.")
    ] = False,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Number of rows for --agreement.")] = 100,
    overwrite: Overwrite = False,
    config: Config = None,
):
    """Export a model to CTranslate2 (CPUs, NVIDIA GPUs) or ONNX (onnxruntime, OpenVINO, browsers, NPUs).

    --agreement generates for held-out Python functions with the model in float32 and with the export, and prints how
    much is equal and the ROUGE-L of both. It is not available for vision-text models.

    \b
    Examples:
      encdec-slm export outputs/distill_docstrings outputs/ct2
      encdec-slm export outputs/distill_docstrings outputs/onnx --format onnx --quantization int8 --agreement
      encdec-slm export outputs/distill_docstrings outputs/npu --format onnx --static-lengths 64 --static-lengths 256
    """
    if format == "ctranslate2" and static_lengths:
        raise UsageError("--static-lengths is for ONNX graphs: add --format onnx.")
    if format == "ctranslate2":
        from encdec_slm.export import export_ctranslate2

        quantization, loader = quantization or "int8", "CT2EncDecSLM"
        folder = export_ctranslate2(model, output, quantization, overwrite=overwrite).resolve()
    else:
        from encdec_slm.export import export_onnx

        options = {"quantization": quantization, "static_lengths": static_lengths or None, "overwrite": overwrite}
        calibration = _load_calibration_rows() if quantization == "int8_static" else None
        folder, loader = export_onnx(model, output, calibration=calibration, **options).resolve(), "OrtEncDecSLM"
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Wrote {size / 1e6:,.1f} MB in {quantization or 'float32'} to {folder}. Load it with\n")
    print(f"    {loader}.from_pretrained({str(folder)!r})", flush=True)
    if not any(folder.glob("tokenizer*")):
        print_status(f"{model} has no tokenizer, so the export has none: it generates from token ids only.")
    if agreement:
        _print_agreement(model, folder, loader, rows, static_lengths)


def _load_calibration_rows(num_rows=32):
    from encdec_slm.trainers.tasks.docstrings import build_docstring_task

    sources = build_docstring_task()["test"]["source"]
    return sources[:: max(1, len(sources) // num_rows)][:num_rows]


def _print_agreement(model, folder, loader, num_rows, static_lengths):
    from encdec_slm import export
    from encdec_slm.checkpoints import load_checkpoint
    from encdec_slm.trainers.engine_agreement import measure_agreement
    from encdec_slm.trainers.tasks.docstrings import build_docstring_task

    original, tokenizer = load_checkpoint(model, dtype="float32")
    # Not the test split: its rows calibrate ONNX graphs.
    rows = build_docstring_task()["validation"].shuffle(seed=0)
    if static_lengths:
        rows = rows.filter(lambda row: len(tokenizer(row["source"])["input_ids"]) <= max(static_lengths))
    rows = rows.select(range(min(num_rows, len(rows))))
    exported = getattr(export, loader).from_pretrained(folder)
    scores = measure_agreement(original, exported, tokenizer, rows["source"], rows["target"])
    print(f"\nOn {len(rows)} held-out rows of the docstring task, compared with the model in float32:")
    print(f"  equal tokens      {scores['token_match']:6.2f} %")
    print(f"  equal targets     {scores['exact_match']:6.2f} %")
    print(f"  ROUGE-L           {scores['rougeL_exported']:6.2f} (export), {scores['rougeL_model']:.2f} (model)")


__all__ = ["adapt", "convert", "export"]
