# SPDX-License-Identifier: Apache-2.0
"""A web page to try a model of this family: text, or an image and a question, in; the generated text out.

    python app.py --model FOLDER_OR_HUB_NAME

Runs without `encdec_slm`, in a Space of the Hub too, where the variables `MODEL_ID` and `MODEL_REVISION` name the
model. Only the comparison with a decoder-only baseline needs the package.
"""

import argparse
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image, ImageDraw, ImageFont
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)


MODEL_ID = os.environ.get("MODEL_ID", "")
# The checkpoint contains code: a commit hash runs the code that was read, a branch whatever is committed next.
MODEL_REVISION = os.environ.get("MODEL_REVISION", "")
MODEL_TYPES = ("encdec_slm", "encdec_vlm")
DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS = 48, 256
HUB_TIMEOUT_SECONDS = 10
EXAMPLE_TEXTS = (
    "find all files larger than 100 MB in /var",
    "count the lines of notes.txt",
    "delete all empty files below the current directory",
)
CSS = """
.code textarea {font-family: ui-monospace, Consolas, monospace}
#picture img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
footer {opacity: 0.6}
"""


class InputError(ValueError):
    """A message for the page about an input that cannot be used."""


# The model


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Args:
        name (`str`): Shown on the page.
        model ([`~transformers.PreTrainedModel`]): In evaluation mode, on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        processor (*optional*): Of a vision-text model. `None` for text models.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any = None

    @property
    def max_source_length(self) -> int:
        """Longest source in tokens, image tokens included."""
        positions = self.model.config.get_text_config().max_position_embeddings
        # The tokenizer's limit is for text, and an image can have more tokens.
        return positions if self.processor else min(positions, self.tokenizer.model_max_length)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens that a visitor can ask for."""
        return min(MAX_NEW_TOKENS, self.model.config.get_text_config().max_position_embeddings - 1)


def load_model(model: str | os.PathLike, revision: str | None = None) -> LoadedModel:
    """Load a model with the code of its checkpoint, in float32 on a CPU, and as saved on a GPU.

    Args:
        model (`str` or `os.PathLike`): Folder of a checkpoint, or its name on the Hub.
        revision (`str`, *optional*): Commit, tag or branch on the Hub. `None` is the newest commit.

    Raises:
        ValueError: There is no such checkpoint, or it is not one of this family.
    """
    name, options = os.fspath(model), {"trust_remote_code": True, "revision": revision or None}
    try:
        if not Path(name).is_dir():
            options["local_files_only"] = not _check_hub_name(name, options["revision"])
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type not in MODEL_TYPES:
            raise ValueError(f"its `model_type` is {config.model_type!r}")
        return _load(name, config, options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` {name!r} could not be loaded ({' '.join(str(error).split()):.500}). Give a folder with a "
            f"checkpoint of type {' or '.join(MODEL_TYPES)}, or the name of one on the Hub."
        ) from error


def _check_hub_name(name, revision):
    """Return whether the Hub can be reached. transformers retries an unreachable Hub for half a minute; ask once."""
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except (HFValidationError, HfHubHTTPError):
        raise
    except Exception:  # errors of the HTTP client: the files may be in the cache
        return False
    return True


def _load(name, config, options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # bfloat16 is slow on many CPUs.
    dtype = torch.float32 if device == "cpu" else "auto"
    has_vision = hasattr(config, "vision_config")
    auto_class = AutoModelForImageTextToText if has_vision else AutoModelForSeq2SeqLM
    model = auto_class.from_pretrained(name, dtype=dtype, **options).eval().to(device)
    title = Path(name).resolve().name if Path(name).is_dir() else name
    if not has_vision:
        return LoadedModel(title, model, AutoTokenizer.from_pretrained(name, **options))
    processor = AutoProcessor.from_pretrained(name, **options)
    return LoadedModel(title, model, processor.tokenizer, processor)


# Inputs


def encode_source(loaded: LoadedModel, text: Any, picture: Any = None) -> dict[str, torch.Tensor]:
    """Encode a text, or an image file and a question, as model inputs on the model's device.

    Raises:
        InputError: It is empty, too long or of another type, or the file is not an image.
    """
    kind = "question" if loaded.processor else "text"
    if not isinstance(text, str):
        raise InputError(f"The {kind} is {text!r:.80}, but must be text.")
    if not text.strip():
        raise InputError(f"Enter a {kind} first.")
    if loaded.processor is None:
        inputs = loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False, verbose=False)
    elif picture is None:
        raise InputError("Upload an image first.")
    else:
        check_picture(loaded, picture)
        inputs = loaded.processor.encode_questions(text, os.fspath(picture), return_tensors="pt")
    length, limit = inputs["input_ids"].shape[1], loaded.max_source_length
    if length > limit:
        given = "The image and the question have" if loaded.processor else "The text has"
        raise InputError(f"{given} {length:,} tokens, but this model reads at most {limit:,}. Shorten the {kind}.")
    return {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}


def check_picture(loaded: LoadedModel, file: str | os.PathLike) -> None:
    """Check that the processor can read an image file.

    Raises:
        InputError: It is damaged, too large, or not an image.
    """
    try:
        loaded.processor.image_processor.fetch_images(os.fspath(file))
    except (OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).replace(os.fspath(file), Path(file).name)
        raise InputError(f"This file cannot be read as an image. {reason:.300}") from error


def parse_new_tokens(value: Any, limit: int) -> int:
    """Parse the number of new tokens that a client sends, and limit it to what the slider offers.

    Raises:
        InputError: It is not a number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InputError(f"The number of new tokens is {value!r:.80}, but must be a number from 2 to {limit}.")
    return int(max(2, min(number, limit)))


# Generation


def stream_text(
    loaded: LoadedModel, inputs: dict[str, torch.Tensor], num_new_tokens: int, stop: threading.Event, **options: Any
) -> Iterator[tuple[str, int | None]]:
    """Yield the text so far, word by word, by greedy search; at the end the whole text and its number of tokens.

    Args:
        loaded ([`LoadedModel`]): Model that generates.
        inputs (`dict[str, torch.Tensor]`): From [`encode_source`].
        num_new_tokens (`int`): Most tokens to generate.
        stop (`threading.Event`): Ends the text after the current token.
        **options: Passed to `generate`.
    """
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    num_prompt_tokens = 1 if loaded.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    options = {"max_new_tokens": num_new_tokens, "do_sample": False, "num_beams": 1, "streamer": streamer} | options
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(loaded.model.generate, **inputs, stopping_criteria=[_stopping_criterion(stop)], **options)
        # After an error the streamer would wait forever.
        future.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))
        text = ""
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield text, None
        except GeneratorExit:
            stop.set()
            raise
    generated = future.result()[0, num_prompt_tokens:]
    yield loaded.tokenizer.decode(generated, skip_special_tokens=True), len(generated)


def _stopping_criterion(event):
    def is_stopped(input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], event.is_set(), dtype=torch.bool, device=input_ids.device)

    return is_stopped


def answer(
    loaded: LoadedModel,
    text: Any,
    picture: Any,
    num_new_tokens: Any,
    stop: threading.Event,
    baseline: PreTrainedModel | None = None,
) -> Iterator[dict[str, str]]:
    """Yield the changes of the page: `answer`, `message` and, with a baseline, `baseline_text` and `speeds`.

    Args: as in [`encode_source`] and [`stream_text`], of any type because a client of the API can send anything, and
        baseline ([`~transformers.PreTrainedModel`], *optional*): Decoder-only model to time in comparison.
    """
    yield {"answer": "", "message": "Generating ..."} | ({"baseline_text": "", "speeds": ""} if baseline else {})
    try:
        num_new_tokens = parse_new_tokens(num_new_tokens, loaded.max_new_tokens)
        inputs = encode_source(loaded, text, picture)
        yield from _stream_answer(loaded, inputs, num_new_tokens, stop)
        if baseline is not None and not stop.is_set():
            yield from _compare(loaded, baseline, inputs, num_new_tokens, stop)
    except InputError as error:
        yield {"message": str(error)}
    except Exception as error:  # of the model, such as out of memory: the page keeps running
        reason = " ".join(str(error).split())
        yield {"message": f"The model failed on this input ({type(error).__name__}: {reason:.200})."}


def _stream_answer(loaded, inputs, num_new_tokens, stop):
    start, first = time.perf_counter(), None
    for text, num_generated in stream_text(loaded, inputs, num_new_tokens, stop):
        if num_generated is None:
            first = first or time.perf_counter() - start
            yield {"answer": text}
    message = f"{num_generated} tokens in {time.perf_counter() - start:.2f} s"
    if first is not None:
        message += f", the first word after {1000 * first:,.0f} ms"
    if stop.is_set():
        message = f"Stopped: {message}."
    elif not text.strip():
        message = f"The model generated an empty text: {message}."
    elif num_generated >= num_new_tokens:
        message += ". The limit of new tokens was reached; raise it with the slider."
    else:
        message += "."
    yield {"answer": text, "message": message}


def _compare(loaded, baseline, inputs, num_new_tokens, stop):
    """Yield the text of the baseline on the same input, and then the speed of both, measured without streaming."""
    from encdec_slm.hub_cards.space.baseline import adapt_inputs, measure_speeds

    own_inputs, other = adapt_inputs(loaded.model, inputs), LoadedModel("baseline", baseline, loaded.tokenizer)
    for text, _ in stream_text(other, own_inputs, num_new_tokens, stop, min_new_tokens=num_new_tokens):
        yield {"baseline_text": text}
    yield {"speeds": "Measuring the speed of both models ..."}
    speeds = "Stopped before both models were measured."
    for speeds in measure_speeds((loaded.model, baseline), (inputs, own_inputs), num_new_tokens, stop):
        yield {"speeds": speeds}
    yield {"speeds": speeds}


def build_baseline(model: PreTrainedModel) -> PreTrainedModel:
    """Build the decoder-only baseline of a model.

    Raises:
        ImportError: `encdec_slm`, which defines the baseline, is not installed.
    """
    try:
        from encdec_slm.hub_cards.space import baseline
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The comparison requires the package `{error.name.partition('.')[0]}`, which is not installed. Run `pip "
            "install encdec-slm`."
        ) from error
    return baseline.build_baseline(model)


# The page


def format_size(model: PreTrainedModel) -> str:
    """Format the number of parameters in millions, with three digits."""
    return f"{model.num_parameters() / 1e6:.3g}M"


def _import_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError(
            "The package `gradio` is required but not installed. Run `pip install encdec-slm[demo]`."
        ) from error
    return gradio


def build_page(model: str | os.PathLike, *, compare: bool = False, revision: str | None = None):
    """Build the page of a model, as a `gradio.Blocks` that is not launched.

    Args:
        model (`str` or `os.PathLike`): Folder of a checkpoint, or its name on the Hub. Its code is run; see
            `revision`.
        compare (`bool`, *optional*, defaults to `False`): After each answer, time the model and a decoder-only
            baseline of the same size on the same input.
        revision (`str`, *optional*): Commit, tag or branch on the Hub. `None` is the newest commit.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: There is no such checkpoint, or it is not one of this family.
    """
    gradio, loaded = _import_gradio(), load_model(model, revision)
    baseline, message = None, ""
    if compare:
        try:
            baseline = build_baseline(loaded.model)
        except ImportError as error:
            message = str(error)
    with gradio.Blocks(title=loaded.name, analytics_enabled=False) as page:
        gradio.Markdown(format_heading(loaded))
        parts = _place_parts(gradio, loaded, baseline, message)
        _connect(gradio, page, parts, loaded, baseline)
    page.queue(default_concurrency_limit=1, max_size=32)
    return page


def format_heading(loaded: LoadedModel) -> str:
    """Format the name and size of a model as Markdown."""
    config = loaded.model.config.get_text_config()
    task = "Ask a question about an image." if loaded.processor else "Text in, text out."
    return (
        f"# {loaded.name}\n{task} An encoder-decoder with {format_size(loaded.model)} parameters: the encoder "
        f"({config.encoder_num_hidden_layers} layers) reads the input once, the decoder "
        f"({config.decoder_num_hidden_layers} layers) runs once per new token. Hidden size {config.hidden_size}, "
        f"vocabulary {config.vocab_size:,}, at most {loaded.max_source_length:,} input tokens. Small models make "
        "mistakes: check the answers."
    )


def _place_parts(gradio, loaded, baseline, message):
    """Place the components; returns them by name."""
    parts = {}
    with gradio.Row(equal_height=False):
        with gradio.Column():
            _place_inputs(gradio, loaded, parts)
        with gradio.Column():
            parts["answer"] = gradio.Textbox(
                label="Answer", lines=3, interactive=False, buttons=["copy"], elem_id="answer"
            )
            parts["message"] = gradio.Markdown(message, elem_id="message")
            if baseline is not None:
                label = f"Decoder-only baseline with {format_size(baseline)} random weights: its text has no meaning"
                parts["baseline_text"] = gradio.Textbox(
                    label=label, lines=3, max_lines=6, interactive=False, elem_id="baseline_text"
                )
                parts["speeds"] = gradio.Markdown(elem_id="speeds")
    return parts


def _place_inputs(gradio, loaded, parts):
    has_vision = loaded.processor is not None
    if has_vision:
        parts["picture"] = gradio.Image(
            label="Image", type="filepath", sources=["upload", "clipboard"], height=320, elem_id="picture"
        )
    parts["source"] = gradio.Textbox(
        label="Question" if has_vision else "Text",
        placeholder="What do you want to know?" if has_vision else "Input of the model",
        lines=1 if has_vision else 4,
        max_lines=24,
        elem_id="source",
        elem_classes=[] if has_vision else ["code"],
    )
    limit = loaded.max_new_tokens
    parts["num_new_tokens"] = gradio.Slider(
        2,
        limit,
        min(DEFAULT_NEW_TOKENS, limit),
        step=1,
        label="Maximum number of new tokens",
        elem_id="num_new_tokens",
    )
    with gradio.Row():
        parts["generate"] = gradio.Button("Ask" if has_vision else "Generate", variant="primary", elem_id="generate")
        parts["stop"] = gradio.Button("Stop", elem_id="stop")
    with tempfile.TemporaryDirectory() as folder:  # gradio keeps copies
        examples = draw_examples(folder, loaded) if has_vision else [[text] for text in EXAMPLE_TEXTS]
        inputs = [parts[name] for name in ("picture", "source") if name in parts]
        gradio.Examples(examples, inputs, label="Examples", cache_examples=False)


def _connect(gradio, page, parts, loaded, baseline):
    """Connect the buttons. Requests are queued; each visitor can stop only their own."""
    running = {}
    outputs = [parts[name] for name in ("answer", "message", "baseline_text", "speeds") if name in parts]
    inputs = [parts[name] for name in ("source", "num_new_tokens", "picture") if name in parts]

    def generate(text, num_new_tokens, picture=None, request: gradio.Request = None):
        stop = running[request.session_hash] = threading.Event()
        file = picture.get("path") if isinstance(picture, dict) else None
        values = {}
        try:
            for changes in answer(loaded, "" if text is None else text, file, num_new_tokens, stop, baseline):
                values |= changes  # clients of the API read only the last values
                yield {parts[name]: value for name, value in values.items()}
        finally:
            running.pop(request.session_hash, None)

    def stop(request: gradio.Request):
        if request.session_hash in running:
            running[request.session_hash].set()

    # `preprocess=False`, because gradio's own errors about image files are not sentences for visitors.
    gradio.on(
        [parts["generate"].click, parts["source"].submit],
        generate,
        inputs,
        outputs,
        preprocess=False,
        show_progress="minimal",
        show_progress_on=parts["answer"],
        api_name="write",  # as in version 0.1
    )
    parts["stop"].click(stop, queue=False, api_visibility="private")
    page.unload(stop)
    if "picture" in parts:

        def check(picture):
            try:
                check_picture(loaded, picture["path"])
            except InputError as error:
                return None, str(error)
            return gradio.skip(), ""

        outputs = [parts["picture"], parts["message"]]
        unqueued = {"preprocess": False, "queue": False, "show_progress": "hidden", "api_visibility": "private"}
        parts["picture"].upload(check, parts["picture"], outputs, **unqueued)


def draw_examples(folder: str | os.PathLike, loaded: LoadedModel) -> list[list[str]]:
    """Draw a page of text and a chart as files in `folder`; returns their paths, each with a question."""
    scale = max(1, loaded.model.config.tile_size // 72)
    page = Image.new("RGB", (72, 72), "white")
    draw = ImageDraw.Draw(page)
    for row, line in enumerate(("Return", "the mean", "of all", "values.")):
        draw.text((0, 12 * row), line, fill="black", font=ImageFont.load_default_imagefont())
    chart = Image.new("RGB", (72, 72), "white")
    draw = ImageDraw.Draw(chart)
    for column, (color, height) in enumerate((("red", 28), ("green", 62), ("blue", 44))):
        draw.rectangle((4 + 23 * column, 70 - height, 21 + 23 * column, 70), fill=color)
    examples = []
    for name, image, question in (
        ("page.png", page, "what does the second line say?"),
        ("chart.png", chart, "what colour is the highest bar?"),  # as in the training data
    ):
        image.resize((72 * scale, 72 * scale), Image.Resampling.NEAREST).save(Path(folder, name))
        examples.append([str(Path(folder, name)), question])
    return examples


# Serving


def serve(
    model: str | os.PathLike,
    *,
    port: int | None = None,
    share: bool = False,
    compare: bool = False,
    revision: str | None = None,
) -> None:
    """Serve the page of a model until interrupted; only on this machine unless `share` is set.

    Args:
        model (`str` or `os.PathLike`): As in [`build_page`]; likewise `compare` and `revision`.
        port (`int`, *optional*): Port of the server. `None` takes the first free one from 7860.
        share (`bool`, *optional*, defaults to `False`): Let gradio open a public address.

    Raises:
        ImportError: Gradio is not installed.
        OSError: The port is taken.
        ValueError: There is no such checkpoint, or it is not one of this family.
    """
    page = build_page(model, compare=compare, revision=revision)
    # Without `server_name` the address is 127.0.0.1, or GRADIO_SERVER_NAME in a Space.
    page.launch(
        server_port=port, share=share, css=CSS, ssr_mode=False, footer_links=["api", "gradio"], max_file_size="50mb"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page that the arguments, or the variables of a Space, name; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_ID, help="folder, or name on the Hub; default: MODEL_ID")
    parser.add_argument("--revision", default=MODEL_REVISION, help="commit on the Hub; default: MODEL_REVISION")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="open a public address through gradio's servers")
    parser.add_argument("--compare", action="store_true", help="time a decoder-only baseline too")
    arguments = parser.parse_args(argv)
    if not arguments.model:
        parser.error("give --model, or set the variable MODEL_ID")
    if not arguments.revision and not Path(arguments.model).is_dir():
        print("No --revision: the code of the newest commit runs. Pin one that you have read.", file=sys.stderr)
    try:
        serve(**vars(arguments))
    except (ImportError, OSError, ValueError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
