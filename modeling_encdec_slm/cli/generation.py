# SPDX-License-Identifier: Apache-2.0
"""`generate`: the output of a model for one text, or for one image and a question."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .console import UsageError


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or an export, or a name on the Hub.")
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="Input. Without it: --file, or standard input.")
    ] = None,
    file: Annotated[str | None, options.file(help="File with the input; - is standard input.")] = None,
    image: Annotated[str | None, options.file(help="Image for a vision-text model; TEXT is the question.")] = None,
    max_new_tokens: Annotated[int | None, options.count(help="Longest output.  [default: the model's]")] = None,
    num_beams: Annotated[
        int | None, options.count(help="Beam search; 1 is greedy search.  [default: the model's]")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, options.count(min=0, help="Repeat no N tokens in a row; 0 allows it.  [default: the model's]")
    ] = None,
    do_sample: Annotated[
        bool, typer.Option("--sample", help="Sample tokens instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Temperature of --sample, which it implies; above 0.")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option(help="Print words as they are generated.  [default: without beams]")
    ] = None,
    truncation: Annotated[
        bool, typer.Option("--truncation", help="Read only the beginning of a text that is too long.")
    ] = False,
    revision: Annotated[str | None, options.revision(help="Branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str | None, options.name(help="Folder in MODEL, such as that of an export.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with MODEL. Read it first.")
    ] = False,
    config: options.Config = None,
):
    """Generate from a text, or from an image and a question. Only the output goes to standard output.

    \b
    Examples:
      encdec-slm generate outputs/distill_docstrings 'def one(): return 1'
      encdec-slm generate outputs/distill_docstrings --file function.py --num-beams 4
      encdec-slm generate outputs/distill_docstrings -- '- a text that begins with a dash'
      cat function.py | encdec-slm generate outputs/ct2 --max-new-tokens 20
      encdec-slm generate outputs/vqa_synthetic 'what digit is left of the 7?' --image picture.png
      encdec-slm generate NAME 'a text' --revision COMMIT --trust-remote-code
    """
    if temperature is not None and not temperature > 0:
        raise UsageError(f"--temperature is {temperature}, but must be above 0.")
    text = _read_text(text, file)
    settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "temperature": temperature}
    settings["no_repeat_ngram_size"] = no_repeat_ngram_size
    settings = {name: value for name, value in settings.items() if value is not None}
    if do_sample or temperature is not None:
        settings["do_sample"] = True
    if image is not None and not Path(image).is_file():
        raise ValueError(f"--image is {image!r}, but there is no such file. Give the path of an image.")
    pipe = _load_pipeline(model, revision, subfolder, trust_remote_code, image)
    num_beams = num_beams or getattr(pipe.model.generation_config, "num_beams", None) or 1
    if stream and num_beams > 1:
        raise UsageError(f"--stream is given, but a search with {num_beams} beams has no stream: add --num-beams 1.")
    if stream is not False and num_beams == 1:
        from transformers import TextStreamer

        tokenizer = pipe.tokenizer or pipe.processor.tokenizer
        settings["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = _generate(pipe, text, image, settings, truncation)
    if "streamer" not in settings:
        print(output)


def _read_text(text, file):
    """Return the input, with line feeds as line ends and none at its end."""
    if text is not None and file is not None:
        raise UsageError("TEXT and --file are both given, but one text is read: leave one of them out.")
    if text is not None:
        # Bytes of the command line that are not UTF-8 arrive as surrogates.
        origin, content = "TEXT", text.encode("utf-8", "surrogateescape")
    elif file not in (None, "-"):
        origin, content = file, _read_bytes(file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise UsageError("There is no input: give TEXT or --file FILE, or pipe a text in.")
    else:
        origin, content = "standard input", sys.stdin.buffer.read()
    text = (
        decode_text(origin, content, "Convert it, or give an image with --image.")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )
    if not text.strip():
        raise ValueError(f"The text ({origin}) is empty. Give a text with at least one word.")
    return text.rstrip("\n")


def _read_bytes(file):
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}). Give the path of a text file.") from error


def decode_text(origin: str, content: bytes, advice: str = "Convert it.") -> str:
    """Decode a text of the command line, a file or a pipe.

    Args:
        origin (`str`): Where it comes from, for the message.
        content (`bytes`): UTF-8, with or without a byte order mark.
        advice (`str`, *optional*): What to do if it is not UTF-8.

    Raises:
        ValueError: It is not UTF-8, or contains zero bytes.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The text ({origin}) is not UTF-8 (byte {error.start} of {len(content):,}). {advice}"
        ) from error
    if "\0" in text:
        raise ValueError(f"The text ({origin}) contains zero bytes, like a binary file. Give a text file.")
    return text


def _load_pipeline(name, revision, subfolder, trust_remote_code, image) -> Any:
    from encdec_slm.checkpoints import has_vision, load_checkpoint
    from encdec_slm.export_manifest import is_export
    from encdec_slm.pipeline_encdec_slm import EncDecVLMPipeline, Text2TextGenerationPipeline

    place = {"revision": revision, "subfolder": subfolder}
    if is_export(name, **place):
        from encdec_slm.export import load_export

        model, processing_class = load_export(name, **place)
    else:
        model, processing_class = load_checkpoint(name, trust_remote_code=trust_remote_code, **place)
    if processing_class is None:
        raise ValueError(
            f"{name!r} has no tokenizer, so it cannot read a text. Save the tokenizer of the model there."
        )
    if has_vision(model) != (image is not None):
        if image is None:
            raise UsageError(f"{name} is a vision-text model, which needs an image: add --image FILE.")
        raise UsageError(f"{name} is a text model, which cannot read images: leave --image out.")
    if image is None:
        return Text2TextGenerationPipeline(model, processing_class)
    return EncDecVLMPipeline(model=model, processor=processing_class)


def _generate(pipe, text, image, settings, truncation):
    if image is None:
        return pipe(text, truncation=truncation, **settings)[0]["generated_text"]
    answers = pipe(images=image, text=text, return_full_text=False, generate_kwargs=settings, truncation=truncation)
    return answers[0]["generated_text"]


__all__ = ["decode_text", "generate"]
