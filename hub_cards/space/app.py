# SPDX-License-Identifier: Apache-2.0
"""A page to try a model of this family: text, or an image and a question, goes in, and the answer appears as written.

    python app.py --model FOLDER_OR_HUB_NAME

This file runs by itself, in a Space of the Hub too, beside transformers, torch, gradio and pillow. A Space passes no
arguments: there the variables `MODEL_ID` and `MODEL_REVISION` name the model. Only the comparison with a decoder-only
twin needs `encdec_slm` installed.
"""

import argparse
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
# The checkpoint brings code: a full commit hash runs what was read, a branch whatever comes next.
MODEL_REVISION = os.environ.get("MODEL_REVISION", "")
FAMILY = ("encdec_slm", "encdec_vlm")
DEFAULT_NEW_TOKENS, MOST_NEW_TOKENS = 48, 256
UNREADABLE = "This file is no image that can be read. Upload a whole PNG, JPEG, GIF, BMP, TIFF or WebP file."
FUNCTIONS = (
    "def area(width, height):\n    return width * height",
    "def remove_suffix(path, suffix):\n    if suffix and path.endswith(suffix):\n"
    "        return path[:-len(suffix)]\n    return path",
)
CSS = """
.code textarea {font-family: ui-monospace, Consolas, monospace}
#picture img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
footer {opacity: 0.6}
"""


class Refused(ValueError):
    """Why an input is not answered, as a sentence for the page."""


@dataclass(frozen=True)
class Loaded:
    """A model of the family and what turns inputs into ids for it.

    Args:
        name (`str`): What the page calls it.
        model ([`~transformers.PreTrainedModel`]): In eval mode, on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        processor (*optional*): Takes images too. `None` for a model of text.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any = None

    @property
    def max_source_length(self) -> int:
        """Tokens that it reads, those of an image included."""
        positions = self.model.config.get_text_config().max_position_embeddings
        # A tokenizer's own limit is for text, and an image may have more tokens than a text ever has.
        return positions if self.processor else min(positions, self.tokenizer.model_max_length)

    @property
    def max_new_tokens(self) -> int:
        return min(MOST_NEW_TOKENS, self.model.config.get_text_config().max_position_embeddings - 1)


def load(model: str | os.PathLike, revision: str | None = None) -> Loaded:
    """The model of a folder or Hub repository, with the code that comes with it: float32 on a CPU, as saved on a GPU.

    Args:
        model (`str` or `os.PathLike`): Folder of a checkpoint, or its name on the Hub.
        revision (`str`, *optional*): Commit, tag or branch on the Hub. `None` means the newest commit.

    Raises:
        ValueError: There is no such checkpoint, or it is not one of this family.
    """
    name, options = os.fspath(model), {"trust_remote_code": True, "revision": revision or None}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type not in FAMILY:
            raise Refused(
                f"`model` {name!r} is of type {config.model_type!r}, but the page is for those of type "
                f"{' and '.join(FAMILY)}. Give a checkpoint of this family."
            )
        return _load(name, config, options)
    except Refused:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` {name!r} could not be loaded ({str(error).strip().splitlines()[0]}). Give a folder with a "
            "checkpoint of this family, or the name of one on the Hub."
        ) from error


def _load(name, config, options):
    sees = hasattr(config, "vision_config")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Many CPUs multiply bfloat16 far more slowly than float32.
    dtype = torch.float32 if device == "cpu" else "auto"
    auto_class = AutoModelForImageTextToText if sees else AutoModelForSeq2SeqLM
    model = auto_class.from_pretrained(name, dtype=dtype, **options).eval().to(device)
    title = Path(name).resolve().name if Path(name).is_dir() else name
    if not sees:
        return Loaded(title, model, AutoTokenizer.from_pretrained(name, **options))
    processor = AutoProcessor.from_pretrained(name, **options)
    return Loaded(title, model, processor.tokenizer, processor)


# From what a visitor gives to what the model reads


def source_inputs(loaded: Loaded, text: str, picture: str | os.PathLike | None = None) -> dict[str, torch.Tensor]:
    """What the model reads of a text, or of an image file and a question about it, on the model's device.

    Raises:
        Refused: It is empty, too long, or the file is no image; the message is a sentence for the page.
    """
    if not text.strip():
        raise Refused(f"There is nothing to read yet. Type a {'question' if loaded.processor else 'text'} first.")
    if loaded.processor is None:
        inputs = loaded.tokenizer(text, return_tensors="pt", verbose=False)
    elif picture is None:
        raise Refused("There is no image yet. Upload one, then ask about it.")
    else:
        inputs = _with_image(loaded.processor, text, open_picture(picture))
    inputs = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    length, limit = inputs["input_ids"].shape[1], loaded.max_source_length
    if length > limit:
        given = "The image and the question have" if loaded.processor else "The text has"
        raise Refused(f"{given} {length:,} tokens, but this model reads at most {limit:,}. Shorten the text.")
    return {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}


def _with_image(processor, text, image):
    if processor.chat_template is None:
        return processor(images=image, text=text, return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")


def open_picture(file: str | os.PathLike) -> Image.Image:
    """The image in a file, decoded.

    Raises:
        Refused: It is damaged, too large, or no image.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Refused(_too_large(f"{image.width:,} x {image.height:,}"))
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(_too_large("too many")) from error
    except Refused:
        raise
    # Pillow's plugins raise anything from OSError to struct.error over a damaged file.
    except Exception as error:
        raise Refused(UNREADABLE) from error


def _too_large(size):
    return f"This image has {size} pixels, but at most {Image.MAX_IMAGE_PIXELS:,} are read. Scale it down."


# Writing


def stream_text(
    loaded: Loaded, inputs: dict[str, torch.Tensor], num_new_tokens: int, stop: threading.Event, **options: Any
) -> Iterator[tuple[str, int | None]]:
    """The text so far, word by word, by greedy search; at last the whole text and how many tokens it has.

    Args:
        loaded ([`Loaded`]): Writes.
        inputs (`dict[str, torch.Tensor]`): Of [`source_inputs`].
        num_new_tokens (`int`): At most so many are written.
        stop (`threading.Event`): Ends the text after the token that is being written.
        **options: Of `generate`.
    """
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    num_given = 1 if loaded.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    options = {"max_new_tokens": num_new_tokens, "do_sample": False, "num_beams": 1, "streamer": streamer} | options
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(loaded.model.generate, **inputs, stopping_criteria=[_stopped_by(stop)], **options)
        # An error would leave the streamer waiting for words that never come.
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
    written = future.result()[0, num_given:]
    yield loaded.tokenizer.decode(written, skip_special_tokens=True), len(written)


def _stopped_by(event):
    def is_stopped(input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], event.is_set(), dtype=torch.bool, device=input_ids.device)

    return is_stopped


def answer(
    loaded: Loaded,
    text: str,
    picture: str | os.PathLike | None,
    num_new_tokens: int,
    stop: threading.Event,
    twin: PreTrainedModel | None = None,
) -> Iterator[dict[str, str]]:
    """What changes on the page, step by step: `answer`, `message`, and with a twin its `noise` and the `speeds`.

    Args: as in [`source_inputs`] and [`stream_text`], and
        twin ([`~transformers.PreTrainedModel`], *optional*): A decoder-only model to be timed beside the other.
    """
    yield {"answer": "", "message": "Reading and writing."} | ({"noise": "", "speeds": ""} if twin else {})
    # A client may send anything for the slider's number.
    num_new_tokens = max(2, min(int(num_new_tokens), loaded.max_new_tokens))
    try:
        inputs = source_inputs(loaded, text, picture)
        yield from _answered(loaded, inputs, num_new_tokens, stop)
        if twin is not None and not stop.is_set():
            yield from _compared(loaded, twin, inputs, num_new_tokens, stop)
    except Refused as refusal:
        yield {"message": str(refusal)}
    # Whatever the model raises, out of memory say: the page lives on and tells.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        yield {"message": f"The model failed on this input ({type(error).__name__}: {reason:.200})."}


def _answered(loaded, inputs, num_new_tokens, stop):
    start, first = time.perf_counter(), None
    for text, num_written in stream_text(loaded, inputs, num_new_tokens, stop):
        if num_written is None:
            first = first or time.perf_counter() - start
            yield {"answer": text}
    seconds = time.perf_counter() - start
    told = f"{num_written} tokens in {seconds:.2f} s"
    if first is not None:
        told += f", the first word after {1000 * first:,.0f} ms"
    if stop.is_set():
        told = f"Stopped: {told}."
    elif not text.strip():
        told = f"The model ended its text before it wrote a word: {told}."
    elif num_written >= num_new_tokens:
        told += ". It wrote as many new tokens as it may; the slider allows more."
    else:
        told += "."
    yield {"answer": text, "message": told}


# The decoder-only twin


def build_twin(model: PreTrainedModel) -> PreTrainedModel:
    """What `encdec_slm.hub_cards.space.twin` builds.

    Raises:
        ImportError: The package, which knows the shape of the twin, is not installed beside this page.
    """
    try:
        from encdec_slm.hub_cards.space import twin
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The comparison with a decoder-only twin needs the package `{error.name.partition('.')[0]}`, which is "
            "not installed beside this page. Run `pip install encdec-slm`."
        ) from error
    return twin.build_twin(model)


def _compared(loaded, twin, inputs, num_new_tokens, stop):
    """What the twin writes on the same input, and then how fast both are, measured without a page in between."""
    from encdec_slm.hub_cards.space.twin import measure, twin_inputs

    of_twin, writer = twin_inputs(loaded.model, inputs), Loaded("twin", twin, loaded.tokenizer)
    for text, _ in stream_text(writer, of_twin, num_new_tokens, stop, min_new_tokens=num_new_tokens):
        yield {"noise": text}
    yield {"speeds": "Measuring both, in turn."}
    speeds = ""
    for speeds in measure((loaded.model, twin), (inputs, of_twin), num_new_tokens, stop):
        yield {"speeds": speeds}
    if not speeds:
        yield {"speeds": "Stopped before both were measured."}


# The page


def size_of(model: PreTrainedModel) -> str:
    """Parameters in millions, with three digits."""
    return f"{model.num_parameters() / 1e6:.3g}M"


def _gradio():
    """Gradio, told before it is loaded that it reports to nobody."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError(
            "The page needs the package `gradio`, which is not installed. Run `pip install encdec-slm[demo]`."
        ) from error
    return gradio


def build_page(model: str | os.PathLike, *, compare_with_twin: bool = False, revision: str | None = None):
    """The page of a model, as a `gradio.Blocks` that is not launched yet.

    Args:
        model (`str` or `os.PathLike`): Folder of a checkpoint, or its name on the Hub. Its code runs: see `revision`.
        compare_with_twin (`bool`, *optional*, defaults to `False`): After each answer, time the model beside a
            decoder-only one of the same size, on the same input.
        revision (`str`, *optional*): Commit, tag or branch on the Hub. `None` means the newest commit.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: There is no such checkpoint, or it is not one of this family.
    """
    gradio, loaded = _gradio(), load(model, revision)
    twin, missing = None, ""
    if compare_with_twin:
        try:
            twin = build_twin(loaded.model)
        except ImportError as error:
            missing = str(error)
    with gradio.Blocks(title=loaded.name, analytics_enabled=False) as page:
        gradio.Markdown(heading(loaded))
        parts = _place_parts(gradio, loaded, twin, missing)
        _connect(gradio, page, parts, loaded, twin)
    page.queue(default_concurrency_limit=1, max_size=32)
    return page


def heading(loaded: Loaded) -> str:
    """Name and size of a model, as Markdown."""
    config = loaded.model.config.get_text_config()
    job = "Ask about an image." if loaded.processor else "Text in, text out."
    return (
        f"# {loaded.name}\n{job} An encoder-decoder of {size_of(loaded.model)} parameters: "
        f"{config.encoder_num_hidden_layers} layers read the input once, {config.decoder_num_hidden_layers} run per "
        f"new token. Width {config.hidden_size}, vocabulary {config.vocab_size:,}; reads at most "
        f"{loaded.max_source_length:,} tokens. Small models err: check what they write."
    )


def _place_parts(gradio, loaded, twin, missing):
    """The components by name, from left to right and top to bottom."""
    parts = {}
    with gradio.Row(equal_height=False):
        with gradio.Column():
            _place_inputs(gradio, loaded, parts)
        with gradio.Column():
            parts["answer"] = gradio.Textbox(
                label="Answer", lines=3, interactive=False, buttons=["copy"], elem_id="answer"
            )
            parts["message"] = gradio.Markdown(missing, elem_id="message")
            if twin is not None:
                label = f"Decoder-only twin of {size_of(twin)} parameters, with random weights: this text is noise"
                parts["noise"] = gradio.Textbox(label=label, lines=3, max_lines=6, interactive=False, elem_id="noise")
                parts["speeds"] = gradio.Markdown(elem_id="speeds")
    return parts


def _place_inputs(gradio, loaded, parts):
    sees = loaded.processor is not None
    if sees:
        parts["picture"] = gradio.Image(
            label="Image", type="filepath", sources=["upload", "clipboard"], height=320, elem_id="picture"
        )
    parts["source"] = gradio.Textbox(
        label="Question" if sees else "Text",
        placeholder="What do you want to know?" if sees else "What the model is to read",
        lines=1 if sees else 10,
        max_lines=24,
        elem_id="source",
        elem_classes=[] if sees else ["code"],
    )
    most = loaded.max_new_tokens
    parts["num_new_tokens"] = gradio.Slider(
        2, most, min(DEFAULT_NEW_TOKENS, most), step=1, label="New tokens, at most", elem_id="num_new_tokens"
    )
    with gradio.Row():
        parts["write"] = gradio.Button("Ask" if sees else "Write", variant="primary", elem_id="write")
        parts["stop"] = gradio.Button("Stop", elem_id="stop")
    with tempfile.TemporaryDirectory() as folder:  # gradio keeps copies
        examples = [[text] for text in FUNCTIONS] if not sees else example_pictures(folder, loaded)
        inputs = [parts[name] for name in ("picture", "source") if name in parts]
        gradio.Examples(examples, inputs, label="Examples", cache_examples=False)


def _connect(gradio, page, parts, loaded, twin):
    """What happens on a click. One visitor after the other writes; each may stop what is his."""
    running = {}
    outputs = [parts[name] for name in ("answer", "message", "noise", "speeds") if name in parts]
    inputs = [parts[name] for name in ("source", "num_new_tokens", "picture") if name in parts]

    def write(text, num_new_tokens, picture=None, request: gradio.Request = None):
        stop = running[request.session_hash] = threading.Event()
        file = picture and picture.get("path")
        try:
            for changes in answer(loaded, text or "", file, num_new_tokens, stop, twin):
                yield {parts[name]: value for name, value in changes.items()}
        finally:
            running.pop(request.session_hash, None)

    def halt(request: gradio.Request):
        if request.session_hash in running:
            running[request.session_hash].set()

    # Gradio's own reading of an image file would raise its own words over one that is none.
    gradio.on(
        [parts["write"].click, parts["source"].submit],
        write,
        inputs,
        outputs,
        preprocess=False,
        show_progress="minimal",
        show_progress_on=parts["answer"],
        api_name="write",
    )
    parts["stop"].click(halt, queue=False, api_visibility="private")
    page.unload(halt)
    if "picture" in parts:

        def check(picture):
            try:
                open_picture(picture["path"])
            except Refused as refusal:
                return None, str(refusal)
            return gradio.skip(), ""

        outputs = [parts["picture"], parts["message"]]
        unqueued = {"preprocess": False, "queue": False, "show_progress": "hidden", "api_visibility": "private"}
        parts["picture"].upload(check, parts["picture"], outputs, **unqueued)


def example_pictures(folder: str | os.PathLike, loaded: Loaded) -> list[list[str]]:
    """A drawn page of text and a drawn chart, as files in `folder`, each with a question."""
    side = loaded.model.config.tile_size
    scale = max(1, side // 72)
    page = Image.new("RGB", (72, 72), "white")
    draw = ImageDraw.Draw(page)
    for row, line in enumerate(("Return", "the mean", "of all", "values.")):
        draw.text((0, 12 * row), line, fill="black", font=ImageFont.load_default_imagefont())
    chart = Image.new("RGB", (72, 72), "white")
    draw = ImageDraw.Draw(chart)
    for column, (colour, height) in enumerate((("red", 28), ("green", 62), ("blue", 44))):
        draw.rectangle((4 + 23 * column, 70 - height, 21 + 23 * column, 70), fill=colour)
    examples = []
    for name, image, question in (
        ("page.png", page, "what does the second line say?"),
        ("chart.png", chart, "what colour is the highest bar?"),
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
    """Shows the page of a model until it is interrupted, on this machine alone unless told otherwise.

    Args:
        model (`str` or `os.PathLike`): As in [`build_page`], as is `revision`.
        port (`int`, *optional*): Of the server. `None` takes the first free one from 7860 on.
        share (`bool`, *optional*, defaults to `False`): Let gradio open a public address for it.
        compare (`bool`, *optional*, defaults to `False`): Time the model beside its decoder-only twin.

    Raises:
        ImportError: Gradio is not installed.
        OSError: The port is taken.
        ValueError: There is no such checkpoint, or it is not one of this family.
    """
    page = build_page(model, compare_with_twin=compare, revision=revision)
    # Without `server_name` it is 127.0.0.1, or what a Space says in GRADIO_SERVER_NAME.
    page.launch(
        server_port=port, share=share, css=CSS, ssr_mode=False, footer_links=["api", "gradio"], max_file_size="50mb"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page that the arguments, or the variables of a Space, name; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_ID, help="folder, or name on the Hub; default: MODEL_ID")
    parser.add_argument("--revision", default=MODEL_REVISION, help="commit on the Hub; default: MODEL_REVISION")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="open a public address through gradio's servers")
    parser.add_argument("--compare", action="store_true", help="time the model beside its decoder-only twin")
    arguments = parser.parse_args(argv)
    if not arguments.model:
        parser.error("no model is named: give --model, or set the variable MODEL_ID")
    if not arguments.revision and not Path(arguments.model).is_dir():
        print("No revision is given: the code of the newest commit runs. Pin one that you have read.", file=sys.stderr)
    try:
        serve(
            arguments.model,
            port=arguments.port,
            share=arguments.share,
            compare=arguments.compare,
            revision=arguments.revision,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
