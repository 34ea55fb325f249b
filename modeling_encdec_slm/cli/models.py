# SPDX-License-Identifier: Apache-2.0
"""`adapt`, `convert` and `export`: checkpoints of other kinds become checkpoints of this family, and these exports."""

import json
from typing import Annotated, Literal

import typer

from . import options
from .console import UsageError, print_status
from .training import run_distill, run_finetune


TOKENIZER_HELP = (
    "Folder or Hub name of the tokenizer that the checkpoint was trained with; microsoft/Phi-3.5-mini-instruct for "
    "the released one.  [default: the one beside PATH]"
)
QUANTIZATION_HELP = (
    "ctranslate2: int8 (default), float32, int8_float32, ...; onnx: int8, or int8_static with activation ranges "
    "measured now; others: float16, int8 or int4.  [default: float32]"
)
# Calls that load an export in engines that this package does not run.
LOADERS = {
    "transformers-js": "await pipeline('text2text-generation', {!r}, {{ dtype: 'auto' }})  // JavaScript",
    "ort-genai": "onnxruntime_genai.Model({!r})",
    "openvino-genai": "openvino_genai.LLMPipeline({!r}, 'CPU', ATTENTION_BACKEND='SDPA')",
}


def adapt(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or Hub name of a decoder-only checkpoint.")],
    output: options.Output,
    encoder_layers: Annotated[
        int | None, options.count(help="Layers of the encoder.  [default: its share in --split]")
    ] = None,
    decoder_layers: Annotated[
        int | None, options.count(help="Layers of the decoder.  [default: its share in --split]")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Shares of the source's layers: 2/3-1/3, 1/2-1/2 or 1/3-2/3.")
    ] = "2/3-1/3",
    strategy: Annotated[str, typer.Option(help="Which layers are copied: outer, even or first-last.")] = "outer",
    trim_vocabulary: Annotated[
        str | None, options.file(help="Keep only the tokens that the rows of this data file use.")
    ] = None,
    vocabulary_size: Annotated[
        int | None, options.count(help="With --trim-vocabulary: keep only the N most frequent tokens.")
    ] = None,
    calibration: Annotated[
        str | None, options.file(help="Print the loss before training on the rows of this data file.")
    ] = None,
    overwrite: options.Overwrite = False,
    distill: Annotated[str | None, options.recipe(help="Then distill SOURCE into the result, by this recipe.")] = None,
    finetune: Annotated[str | None, options.recipe(help="Then fine-tune the result, by this recipe.")] = None,
    config: options.Config = None,
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
    from encdec_slm.trainers import adapt_job

    rows = {"trim_vocabulary": trim_vocabulary, "vocabulary_size": vocabulary_size, "calibration": calibration}
    print("\n".join(adapt_job.adapt(source, output, overwrite=overwrite, **rows, **shape)), flush=True)
    if distill or finetune:
        arguments = ["--config", distill or finetune, "--model_name_or_path", output]
        arguments += ["--teacher_model_name_or_path", source] if distill else []
        (run_distill if distill else run_finetune)([*arguments, *ctx.args])


def convert(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="The original model.pt (`git lfs pull` gets it)."),
    ],
    output: options.Output,
    tokenizer: Annotated[str | None, options.folder(help=TOKENIZER_HELP)] = None,
    model_config: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Fields of the original config that the checkpoint does not state."),
    ] = None,
    overwrite: options.Overwrite = False,
    config: options.Config = None,
):
    """Convert a checkpoint of microsoft/encoder-decoder-slm into a folder of this family.

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
    model: options.Model,
    output: options.Output,
    format: Annotated[
        Literal["ctranslate2", "onnx", "transformers-js", "ort-genai", "openvino-genai"],
        typer.Option(help="onnx is for all models, the others for text models."),
    ] = "ctranslate2",
    quantization: Annotated[str | None, typer.Option(metavar="KIND", help=QUANTIZATION_HELP)] = None,
    static_lengths: Annotated[
        list[int] | None, options.count(help="Source length of an ONNX graph of fixed shape, for NPUs. Repeat it.")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Compare the export with the model on held-out docstring rows.")
    ] = False,
    rows: Annotated[int, options.count(help="Number of rows for --agreement.")] = 100,
    overwrite: options.Overwrite = False,
    config: options.Config = None,
):
    """Export a model to the format of an engine: on CPUs, GPUs or NPUs, or in a browser.

    --agreement generates for held-out Python functions with the model in float32 and with the export, and prints how
    much is equal and the ROUGE-L of both. It is available for text models in ctranslate2 and onnx.

    \b
    Examples:
      encdec-slm export outputs/distill_docstrings outputs/ct2
      encdec-slm export outputs/distill_docstrings outputs/onnx --format onnx --quantization int8 --agreement
      encdec-slm export outputs/distill_docstrings outputs/npu --format onnx --static-lengths 64 --static-lengths 256
      encdec-slm export checkpoints/shell outputs/js --format transformers-js --quantization int8
    """
    if format != "onnx" and static_lengths:
        raise UsageError("--static-lengths is for ONNX graphs: add --format onnx.")
    if agreement and format in LOADERS:
        raise UsageError(f"--agreement is for ctranslate2 and onnx, but --format is {format}.")
    if format == "ctranslate2":
        from encdec_slm.export import export_ctranslate2

        quantization, call = quantization or "int8", "CT2EncDecSLM.from_pretrained({!r})"
        folder = export_ctranslate2(model, output, quantization, overwrite=overwrite).resolve()
    elif format in LOADERS:
        from encdec_slm import export as exporters

        export_model = getattr(exporters, f"export_{format.replace('-', '_')}")
        folder = export_model(model, output, quantization=quantization, overwrite=overwrite).resolve()
        call = LOADERS[format]
    else:
        from encdec_slm.export import export_onnx

        settings = {"quantization": quantization, "static_lengths": static_lengths or None, "overwrite": overwrite}
        if quantization == "int8_static":
            from encdec_slm.trainers.engine_agreement import load_calibration_rows

            settings["calibration"] = load_calibration_rows()
        folder, call = export_onnx(model, output, **settings).resolve(), "OrtEncDecSLM.from_pretrained({!r})"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Wrote {size / 1e6:,.1f} MB in {quantization or 'float32'} to {folder}. Load it with\n")
    print(f"    {call.format(str(folder))}", flush=True)
    if not any(folder.glob("tokenizer*")):
        print_status(f"{model} has no tokenizer, so the export has none: it generates from token ids only.")
    if agreement:
        from encdec_slm.checkpoints import load_checkpoint
        from encdec_slm.export import load_export
        from encdec_slm.trainers.engine_agreement import describe_agreement

        (original, tokenizer), (exported, _) = load_checkpoint(model, dtype="float32"), load_export(folder)
        print(f"\n{describe_agreement(original, exported, tokenizer, rows, max(static_lengths or [0]) or None)}")


__all__ = ["adapt", "convert", "export"]
