# SPDX-License-Identifier: Apache-2.0
"""Prepare, load and time a contender in each engine."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import CompileConfig

from ..checkpoints import write_folder
from ..errors import require_package
from ..export import export_ctranslate2, export_onnx, export_ort_genai
from ..export.onnx_quantization import quantize_graphs
from ..export.onnx_runtime import DynamicEngine, check_providers, open_onnxruntime_graph
from ..export.onnx_tracing import SharedWeights
from ..export.openvino_model import Compiler
from ..generation_speed import token_seconds
from .contenders import BASELINE, OURS, Contender
from .decoder_only import (
    build_decoder_only_spec,
    export_decoder_only,
    export_decoder_only_genai,
    time_decoder_only_tokens,
)


# Source ids and a number of new tokens -> seconds from the call until each of them is known.
TokenSeconds = Callable[[Sequence[int], int], list[float]]
Clock = Callable[[], float]
DECODER_ONLY_FILE = "decoder_only_model.onnx"


def find_bundle_folder(contender: Contender, folder: Path) -> Path:
    """Return the folder in `folder` of a contender's files; engines that read the same files share it."""
    engine = "onnx" if contender.engine in ("onnxruntime", "openvino") else contender.engine
    # OpenVINO compresses weights when it loads them.
    precision = "float32" if contender.engine == "openvino" else contender.precision
    return folder / f"{contender.preset}-{contender.model}-{engine}-{precision}"


def prepare(contender: Contender, folder: Path) -> None:
    """Export a contender with random weights to its bundle folder; engines of torch need none."""
    model, output_dir = contender.build_model(torch.float32), find_bundle_folder(contender, folder)
    if contender.engine == "ctranslate2":
        _prepare_ctranslate2(model, contender, output_dir)
    elif contender.engine == "onnxruntime_genai":
        _prepare_ort_genai(model, contender, output_dir)
    else:
        _prepare_onnx(model, contender, output_dir)


def load(contender: Contender, folder: Path, num_threads: int, clock: Clock = time.perf_counter) -> TokenSeconds:
    """Load a contender and return the function that times it.

    Args:
        contender ([`Contender`]): To load.
        folder (`Path`): Its bundle folder.
        num_threads (`int`): Threads of the engine.
        clock (`Callable`, *optional*, defaults to `time.perf_counter`): Returns the seconds; `time.process_time`
            returns those of CPU time.
    """
    torch.set_num_threads(num_threads)
    if contender.engine == "ctranslate2":
        return _load_ctranslate2(contender, folder, num_threads, clock)
    if contender.engine in ("onnxruntime", "openvino"):
        return _load_onnx(contender, folder, clock)
    if contender.engine == "onnxruntime_genai":
        return _load_ort_genai(folder, num_threads, clock)
    options = {}
    if contender.engine == "transformers-compiled":
        options["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, mode="default")
        options["compile_config"]._compile_all_devices = True
        options["cache_implementation"] = "static"
    model = contender.build_model(getattr(torch, contender.precision))
    return lambda source_ids, num_new_tokens: token_seconds(
        model, torch.tensor([source_ids], device=model.device), num_new_tokens, clock, **options
    )


# CTranslate2


class _Tokens:
    """A tokenizer for CTranslate2's converters: peers have random weights and no vocabulary."""

    pad_token, eos_token, unk_token, bos_token = "<id_0>", "<nothing ends a text>", "<id_2>", "<id_1>"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def get_vocab(self):
        return {f"<id_{token_id}>": token_id for token_id in range(self.vocab_size)}

    def convert_ids_to_tokens(self, token_id):
        return f"<id_{token_id}>"


def _prepare_ctranslate2(model, contender, output_dir):
    if contender.model == OURS:
        export_ctranslate2(model, output_dir, contender.precision)
        return
    if contender.model == BASELINE:
        spec = build_decoder_only_spec(model)
    else:
        loaders = require_package("ctranslate2.converters.transformers")._MODEL_LOADERS
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        spec = loaders[type(model.config).__name__](model, _Tokens(vocab_size))
    spec.validate()
    spec.optimize(quantization=contender.precision)
    with write_folder(output_dir) as folder:
        spec.save(str(folder))


def _load_ctranslate2(contender, folder, num_threads, clock):
    ctranslate2 = require_package("ctranslate2")
    options = {"device": contender.device, "compute_type": contender.precision, "intra_threads": num_threads}
    if contender.model == BASELINE:
        generator = ctranslate2.Generator(str(folder), **options)
        generate, names = generator.generate_batch, ("max_length", "min_length")
        fixed = {"sampling_topk": 1, "include_prompt_in_result": False}
    else:
        translator = ctranslate2.Translator(str(folder), **options)
        generate, names = translator.translate_batch, ("max_decoding_length", "min_decoding_length")
        fixed = {"beam_size": 1, "max_input_length": 0}

    def time_tokens(source_ids, num_new_tokens):
        moments, tokens = [], [f"<id_{token_id}>" for token_id in source_ids]
        lengths, start = dict.fromkeys(names, num_new_tokens), clock()
        generate([tokens], callback=lambda result: moments.append(clock()), **lengths, **fixed)
        return [moment - start for moment in moments]

    return time_tokens


# ONNX Runtime and OpenVINO


def _prepare_onnx(model, contender, output_dir):
    quantization = "int8" if contender.precision == "int8" and contender.engine == "onnxruntime" else None
    if contender.model == OURS:
        export_onnx(model, output_dir, quantization=quantization)
        return
    with write_folder(output_dir) as folder, tempfile.TemporaryDirectory(dir=output_dir.parent) as temporary:
        export_decoder_only(model, Path(temporary) if quantization else folder, DECODER_ONLY_FILE)
        if quantization:
            for name, graph in quantize_graphs(Path(temporary), None):
                SharedWeights(folder).write_graph(graph, name)


def _load_onnx(contender, folder, clock):
    if contender.engine == "openvino":
        open_graph = Compiler("CPU", contender.precision).open_graph
    else:
        open_graph = partial(open_onnxruntime_graph, providers=check_providers(None))
    config = contender.config
    if contender.model == OURS:
        engine = DynamicEngine(folder, config, open_graph)
        return partial(_time_encoder_decoder, engine, config.decoder_start_token_id, clock)
    graph = open_graph(folder / DECODER_ONLY_FILE)
    return lambda *task: time_decoder_only_tokens(graph, config, *task, clock)[0]


def _prepare_ort_genai(model, contender, output_dir):
    if contender.model == OURS:
        export_ort_genai(model, output_dir, quantization=contender.precision)
        return
    with write_folder(output_dir) as folder:
        export_decoder_only_genai(model, folder, contender.precision)


def _load_ort_genai(folder, num_threads, clock):
    onnxruntime_genai = require_package("onnxruntime_genai")
    # Models of random weights may exceed their length.
    options = {"context_length": 2**17, "decoder": {"session_options": {"intra_op_num_threads": num_threads}}}
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": options}))
    model = onnxruntime_genai.Model(config)

    def time_tokens(source_ids, num_new_tokens):
        start, seconds = clock(), []
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(source_ids) + num_new_tokens)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(source_ids)
        for _ in range(num_new_tokens):
            generator.generate_next_token()
            seconds.append(clock() - start)
        return seconds

    return time_tokens


def _time_encoder_decoder(engine, start_id, clock, source_ids, num_new_tokens):
    """Time greedy search without what `generate` adds, as for the baseline."""
    start, seconds, ids = clock(), [], torch.tensor([[start_id]])
    encoding, cache = engine.encode(torch.tensor([source_ids])), engine.new_cache(1)
    for _ in range(num_new_tokens):
        ids = engine.decode(ids, encoding, None, cache)[:, -1].argmax(-1, keepdim=True)
        seconds.append(clock() - start)
    return seconds


__all__ = ["find_bundle_folder", "load", "prepare"]
