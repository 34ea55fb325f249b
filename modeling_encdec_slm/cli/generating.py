# SPDX-License-Identifier: Apache-2.0
"""`generate`: a model writes for one text, or about one picture."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import Config, Debug, UsageError, examples


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or of an export, or a name on the Hub.")
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What it reads. Without it: --file, or standard input.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with the text; - is standard input.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="PICTURE", help="What a vision-text model sees; TEXT is the question.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The most that is written; default: as the model says.")
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Beam search; 1 is none. Default: as the model says."),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Of --sample, above 0; low is cautious. Implies --sample.")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option(help="Show words as they come; default: unless beams are searched.")
    ] = None,
    truncation: Annotated[
        bool, typer.Option("--truncation", help="Read only the beginning of a text that is too long.")
    ] = False,
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with MODEL; read it first.")
    ] = False,
    config: Config = None,
    debug: Debug = False,
):
    """Write for a text, or about a picture: only what the model writes goes to standard output."""
    if temperature is not None and not temperature > 0:
        raise UsageError(f"--temperature is {temperature}, but logits are divided by it: give a number above 0.")
    text = _source(text, file)
    picture = None if image is None else _picture(image)
    settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "temperature": temperature}
    settings = {name: value for name, value in settings.items() if value is not None}
    if sample or temperature is not None:
        settings["do_sample"] = True
    writer = _writer(model, {"revision": revision or "main", "trust_remote_code": trust_remote_code}, picture)
    num_beams = num_beams or getattr(writer.model.generation_config, "num_beams", None) or 1
    if stream and num_beams > 1:
        raise UsageError(f"--stream shows words as they come, but {num_beams} beams are searched: add --num-beams 1.")
    if stream is not False and num_beams == 1:
        from transformers import TextStreamer

        tokenizer = writer.tokenizer or writer.processor.tokenizer
        settings["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    written = _written(writer, text, picture, settings, truncation)
    if "streamer" not in settings:
        print(written)


generate.examples = examples(
    "encdec-slm generate outputs/distill_docstrings 'def one(): return 1'",
    "encdec-slm generate outputs/distill_docstrings --file function.py --num-beams 4",
    "cat function.py | encdec-slm generate outputs/distill_docstrings --max-new-tokens 20",
    "encdec-slm generate outputs/vqa_synthetic 'what digit is left of the 7?' --image picture.png",
    "encdec-slm generate NAME 'a text' --revision COMMIT --trust-remote-code",
)


def _source(text, file):
    """The text to read, which ends without a line break, wherever it comes from."""
    if text is not None and file is not None:
        raise UsageError("TEXT and --file are both given, but one text is read: leave one of them out.")
    if text is not None:
        # What is not UTF-8 on a command line arrives as surrogates.
        origin, text = "TEXT", _decoded("TEXT", text.encode("utf-8", "surrogateescape"))
    elif file not in (None, "-"):
        origin, text = file, _decoded(file, _bytes_of(file))
    elif sys.stdin is None or sys.stdin.isatty():
        raise UsageError("There is no text: give TEXT, --file FILE, or pipe a text in.")
    else:
        origin = "standard input"
        text = _decoded(origin, sys.stdin.buffer.read())
    if not text.strip():
        raise ValueError(f"The text ({origin}) is empty, but the model has to read something. Give it a text.")
    return text.rstrip("\r\n")


def _bytes_of(file):
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}). Give the path of a text file.") from error


def _decoded(origin, content):
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The text ({origin}) is not UTF-8 (byte {error.start} of {len(content):,}). Convert it, or give a text "
            "file; pictures go by --image."
        ) from error
    if "\0" in text:
        raise ValueError(f"The text ({origin}) has zero bytes, as binary files have. Give a text file.")
    return text


def _picture(path):
    from transformers.image_utils import load_image

    if not Path(path).is_file():
        raise ValueError(f"--image is {path!r}, but there is no such file. Give the path of a picture.")
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture. Give a PNG, a JPEG or the like.") from error


def _writer(name, options, picture) -> Any:
    """The pipeline of a checkpoint or of an export."""
    from transformers.utils import logging

    from encdec_slm.export.bundles import MANIFEST

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    is_export = Path(name, MANIFEST).is_file()
    writer = _writer_of_export(Path(name)) if is_export else _writer_of_checkpoint(name, options)
    sees = hasattr(writer.model.config, "vision_config")
    if sees and picture is None:
        raise UsageError(f"{name} is a vision-text model, which answers about pictures: add --image PICTURE.")
    if not sees and picture is not None:
        raise UsageError(f"{name} is a text model, which sees no pictures: leave --image out.")
    return writer


def _writer_of_export(folder):
    from transformers import AutoTokenizer

    from encdec_slm.export import CT2EncDecSLM, OrtEncDecSLM
    from encdec_slm.export.bundles import read_manifest
    from encdec_slm.pipeline_encdec_slm import Text2TextGenerationPipeline

    form = read_manifest(folder, "ctranslate2", "onnx", "onnx-static")["format"]
    model = (CT2EncDecSLM if form == "ctranslate2" else OrtEncDecSLM).from_pretrained(folder)
    if hasattr(model.config, "vision_config"):
        raise ValueError(f"{str(folder)!r} is the export of a vision-text model, of which only text is written here.")
    return Text2TextGenerationPipeline(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _writer_of_checkpoint(name, options):
    from transformers import AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, ImageTextToTextPipeline

    from encdec_slm.checkpoint_folders import first_line
    from encdec_slm.pipeline_encdec_slm import Text2TextGenerationPipeline

    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(name, **options).eval()
        if hasattr(model.config, "vision_config"):
            return ImageTextToTextPipeline(model=model, processor=AutoProcessor.from_pretrained(name, **options))
        return Text2TextGenerationPipeline(model, AutoTokenizer.from_pretrained(name, **options))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL {name!r} could not be loaded ({first_line(error)}). Give the folder of an encoder-decoder or of "
            "an export, or a name on the Hub."
        ) from error


def _written(writer, text, picture, settings, truncation):
    if picture is None:
        return writer(text, truncation=truncation, **settings)[0]["generated_text"]
    answers = writer(images=picture, text=text, return_full_text=False, generate_kwargs=settings)
    return answers[0]["generated_text"]


__all__ = ["generate"]
