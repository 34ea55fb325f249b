# SPDX-License-Identifier: Apache-2.0
"""How a contender is prepared, loaded and timed, by engine."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import CompileConfig

from ..checkpoint_folders import folder_written_whole
from ..export import export_ctranslate2, export_onnx
from ..export.bundles import required
from ..export.onnx_model import _session
from ..export.onnx_quantization import quantized_graphs
from ..export.onnx_runtime import DynamicEngine, Graph
from ..export.openvino_model import Compiler, OpenVINOGraph
from ..generation_speed import token_seconds
from .contenders import MODULES, OURS, TWIN, Contender, random_model
from .decoder_only import decoder_only_spec, decoder_only_token_seconds, export_decoder_only


# Source ids and a number of new tokens -> seconds from the call until each of these is known.
TokenSeconds = Callable[[Sequence[int], int], list[float]]
TORCH_ENGINES = ("transformers", "transformers-compiled")
DECODER_ONLY_FILE = "decoder_only_model.onnx"


def bundle_folder(contender: Contender, folder: Path) -> Path:
    """Where in `folder` the files of a contender lie; engines that read the same files share them."""
    engine = "onnx" if contender.engine in ("onnxruntime", "openvino") else contender.engine
    # OpenVINO compresses weights when it loads them.
    precision = "float32" if contender.engine == "openvino" else contender.precision
    return folder / f"{contender.preset}-{contender.model}-{engine}-{precision}"


def prepare(contender: Contender, folder: Path) -> None:
    """Writes the files of a contender with random weights to its [`bundle_folder`]; engines of torch need none."""
    model, output_dir = random_model(contender, torch.float32), bundle_folder(contender, folder)
    if contender.engine == "ctranslate2":
        _prepare_ctranslate2(model, contender, output_dir)
    else:
        _prepare_onnx(model, contender, output_dir)


def import_engine(contender: Contender, num_threads: int) -> None:
    """Imports what the engine needs, so that what a model adds to the memory of a process can be told apart."""
    torch.set_num_threads(num_threads)
    if contender.engine in MODULES:
        required(MODULES[contender.engine])


def load(contender: Contender, folder: Path, num_threads: int) -> TokenSeconds:
    """What times a contender.

    Args:
        contender ([`Contender`]): Of which model, in which engine.
        folder (`Path`): Its [`bundle_folder`].
        num_threads (`int`): Of the engine.
    """
    if contender.engine in TORCH_ENGINES:
        return _load_torch(contender)
    if contender.engine == "ctranslate2":
        return _load_ctranslate2(contender, folder, num_threads)
    return _load_onnx(contender, folder)


def _load_torch(contender):
    options = {}
    if contender.engine == "transformers-compiled":
        options["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, mode="default")
        options["compile_config"]._compile_all_devices = True
        options["cache_implementation"] = "static"
    model = random_model(contender, getattr(torch, contender.precision), contender.device)
    return partial(_time_generate, model, options)


def _time_generate(model, options, source_ids, num_new_tokens):
    return token_seconds(model, torch.tensor([source_ids], device=model.device), num_new_tokens, **options)


# CTranslate2


class _Tokens:
    """Stands in for a tokenizer: the shapes of peers have random weights and no vocabulary."""

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
    if contender.model == TWIN:
        spec = decoder_only_spec(model)
    else:
        loaders = required("ctranslate2.converters.transformers")._MODEL_LOADERS
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        spec = loaders[type(model.config).__name__](model, _Tokens(vocab_size))
    spec.validate()
    spec.optimize(quantization=contender.precision)
    with folder_written_whole(output_dir) as folder:
        spec.save(str(folder))


def _load_ctranslate2(contender, folder, num_threads):
    ctranslate2 = required("ctranslate2")
    options = {"device": contender.device, "compute_type": contender.precision, "intra_threads": num_threads}
    if contender.model == TWIN:
        return partial(_time_generator, ctranslate2.Generator(str(folder), **options))
    return partial(_time_translator, ctranslate2.Translator(str(folder), **options))


def _time_generator(generator, source_ids, num_new_tokens):
    lengths = {"max_length": num_new_tokens, "min_length": num_new_tokens}
    options = {**lengths, "sampling_topk": 1, "include_prompt_in_result": False}
    return _time_callbacks(partial(generator.generate_batch, **options), source_ids)


def _time_translator(translator, source_ids, num_new_tokens):
    lengths = {"max_decoding_length": num_new_tokens, "min_decoding_length": num_new_tokens}
    options = {**lengths, "beam_size": 1, "max_input_length": 0}
    return _time_callbacks(partial(translator.translate_batch, **options), source_ids)


def _time_callbacks(write, source_ids):
    """Seconds until CTranslate2 tells of each token; both of its classes tell in the same way."""
    moments = []
    tokens = [f"<id_{token_id}>" for token_id in source_ids]
    start = time.perf_counter()
    write([tokens], callback=lambda result: moments.append(time.perf_counter()))
    return [moment - start for moment in moments]


# ONNX


def _prepare_onnx(model, contender, output_dir):
    quantization = "int8" if contender.precision == "int8" and contender.engine == "onnxruntime" else None
    if contender.model == OURS:
        export_onnx(model, output_dir, quantization=quantization)
        return
    with folder_written_whole(output_dir) as folder:
        if quantization is None:
            export_decoder_only(model, folder / DECODER_ONLY_FILE)
            return
        with tempfile.TemporaryDirectory(dir=output_dir.parent) as temporary:
            export_decoder_only(model, Path(temporary, DECODER_ONLY_FILE))
            for name, graph in quantized_graphs(Path(temporary), None):
                required("onnx_ir").save(graph, folder / name, external_data=f"{name}_data")


def _load_onnx(contender, folder):
    if contender.engine == "openvino":
        compiler = Compiler("CPU", contender.precision)

        def open_graph(graph):
            return OpenVINOGraph(compiler(graph))
    else:

        def open_graph(graph):
            return Graph(_session(graph, ["CPUExecutionProvider"]))

    config = contender.config
    if contender.model == OURS:
        return partial(_time_engine, DynamicEngine(folder, config, open_graph), config.decoder_start_token_id)
    graph = open_graph(folder / DECODER_ONLY_FILE)
    return lambda source_ids, num_new_tokens: decoder_only_token_seconds(graph, config, source_ids, num_new_tokens)[0]


def _time_engine(engine, start_id, source_ids, num_new_tokens):
    """Greedy search without what `generate` adds, as the twin's."""
    start, seconds, ids = time.perf_counter(), [], torch.tensor([[start_id]])
    encoding, cache = engine.encode(torch.tensor([source_ids])), engine.new_cache(1)
    for _ in range(num_new_tokens):
        ids = engine.decode(ids, encoding, None, cache)[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
    return seconds
