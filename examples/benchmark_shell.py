# SPDX-License-Identifier: Apache-2.0
"""Time answers of the shell model, a decoder-only baseline of its size, and a teacher, in several engines.

    python examples/benchmark_shell.py --teacher FOLDER [--gguf FILE] [--output outputs/benchmark_shell]

Greedy search of 20 tokens for six requests, batch 1, and the beam search of `encdec-slm shell`. Each model is
loaded in its own process, and all take turns at each request. The teacher has --threads; the models of this size have
one, because more do not make them faster. The baseline has random weights: only its speed is
measured. The teacher reads the request in examples/shell_prompts/plain.txt. llama.cpp runs a GGUF file of the teacher
if the package `llama-cpp-python` is installed; it reads the part of the prompt that all requests share only once.
Prints the medians, and writes them with all times to benchmark_shell.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from encdec_slm_cli.console import set_up_logging
from encdec_slm_cli.shell_model import NUM_BEAMS, NUM_THREADS, ShellModel, find_model_folder
from shell_demo import NUM_TOKENS, REQUESTS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from encdec_slm.benchmarks.contenders import BASELINE, ITEM_BYTES, OURS, TORCH_ENGINES, Contender
from encdec_slm.benchmarks.engines import find_bundle_folder, load, prepare
from encdec_slm.benchmarks.machine import Worker, describe_machine, run_in_new_process
from encdec_slm.checkpoints import load_checkpoint, write_file
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.configuration.sizes import num_parameters
from encdec_slm.export import export_ctranslate2
from encdec_slm.run_results import format_table
from encdec_slm.trainers.prompt_templates import load_prompt_template


TEACHER = "teacher"
ENGINES = (("transformers", "float32"), ("ctranslate2", "int8"), ("onnxruntime", "int8"))
PROMPT = Path(__file__).parent / "shell_prompts" / "plain.txt"


@dataclass(frozen=True)
class ShellContender(Contender):
    """A contender whose weights and shape come from a folder, or whose shape is that of its baseline."""

    folder: str = ""

    @property
    def config(self):
        config = AutoConfig.from_pretrained(self.folder)
        return decoder_only_twin(config) if self.model == BASELINE else config

    def build_model(self, dtype):
        if self.model == BASELINE:
            return super().build_model(dtype)
        if self.model == OURS:
            model = load_checkpoint(self.folder, dtype=dtype, device="cpu")[0]
        else:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).eval()
        model.generation_config.update(eos_token_id=None, max_length=None, num_beams=1, length_penalty=1.0)
        return model


def load_llama_cpp(path, num_threads, num_tokens=512, clock=time.perf_counter):
    """Return the function that times a GGUF file in llama.cpp."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=num_tokens, n_threads=num_threads, n_threads_batch=num_threads, verbose=False)

    def time_tokens(source_ids, num_new_tokens):
        start = clock()
        tokens = model.generate(source_ids, temp=0.0, repeat_penalty=1.0)
        return [clock() - start for _, _ in zip(range(num_new_tokens), tokens, strict=False)]

    return time_tokens


def load_beams(folder):
    """Return the function that times the search of `encdec-slm shell`; only its end is known."""
    model = ShellModel(folder)

    def time_tokens(request, num_new_tokens):
        start = time.perf_counter()
        beams = dict.fromkeys(("beam_size", "num_hypotheses"), NUM_BEAMS)
        lengths = dict.fromkeys(("min_decoding_length", "max_decoding_length"), num_new_tokens)
        model.translator.translate_batch([model.encode(request)[0]], **beams, **lengths)
        return [time.perf_counter() - start]

    return time_tokens


def list_contenders(folder, teacher):
    for model in (OURS, BASELINE):
        for engine, precision in ENGINES:
            if engine in TORCH_ENGINES or find_spec(engine):
                yield ShellContender(model, engine, precision, "cpu", "shell", str(folder))
    if teacher is not None:
        yield ShellContender(TEACHER, "transformers", "bfloat16", "cpu", "teacher", str(teacher))


def start_workers(arguments, folder, temporary):
    """Start a process for each model in each engine; yields its entry in the report, its worker and its inputs."""
    tokenizer, inputs = AutoTokenizer.from_pretrained(folder), {}
    inputs[OURS] = inputs[BASELINE] = tokenizer(list(REQUESTS))["input_ids"]
    if arguments.teacher is not None:
        tokenizer, render = AutoTokenizer.from_pretrained(arguments.teacher), load_prompt_template(PROMPT)
        messages = [[{"role": "user", "content": render({"source": request})}] for request in REQUESTS]
        options = {"add_generation_prompt": True, "return_dict": True}
        inputs[TEACHER] = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    for one in list_contenders(folder, arguments.teacher):
        bundle = find_bundle_folder(one, temporary)
        if one.engine not in TORCH_ENGINES:
            run_in_new_process(prepare, one, temporary)
        entry = {"model": one.model, "engine": one.engine, "precision": one.precision}
        entry["num_parameters"] = num_parameters(one.config)
        if bundle.exists():
            entry["bytes"] = count_weight_bytes(bundle)
        else:
            entry["bytes"] = ITEM_BYTES[one.precision] * entry["num_parameters"]
        packages = () if one.engine in TORCH_ENGINES else (one.engine,)
        num_threads = arguments.threads if one.model == TEACHER else NUM_THREADS
        worker = Worker(one.name, partial(load, one, bundle, num_threads), "cpu", packages)
        yield entry, worker, inputs[one.model]
    if find_spec("ctranslate2"):
        beams = temporary / "beams"
        export_ctranslate2(folder, beams, quantization="int8")
        entry = {"model": OURS, "engine": f"ctranslate2, {NUM_BEAMS} beams", "precision": "int8"}
        entry |= {"num_parameters": count_parameters(folder), "bytes": count_weight_bytes(beams)}
        yield entry, Worker("beam search", partial(load_beams, beams), "cpu"), REQUESTS
    if arguments.gguf is not None and find_spec("llama_cpp") is None:
        print("llama.cpp is not timed: the package llama-cpp-python is not installed.")
    elif arguments.gguf is not None:
        entry = {"model": TEACHER, "engine": "llama.cpp", "precision": arguments.gguf.stem.rpartition("-")[2]}
        entry |= {"num_parameters": count_parameters(arguments.teacher), "bytes": arguments.gguf.stat().st_size}
        load_gguf = partial(load_llama_cpp, arguments.gguf, arguments.threads)
        yield entry, Worker("llama.cpp", load_gguf, "cpu"), inputs[TEACHER]


def count_parameters(folder):
    return num_parameters(AutoConfig.from_pretrained(folder))


def count_weight_bytes(folder):
    endings = (".bin", ".onnx", ".onnx_data")
    return sum(path.stat().st_size for path in Path(folder).iterdir() if path.name.endswith(endings))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a shell model; default: the one of this repository")
    parser.add_argument("--teacher", type=Path, help="folder of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--gguf", type=Path, help="the teacher for llama.cpp, a file such as teacher-Q4_K_M.gguf")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the teacher")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each request")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_shell"))
    arguments = parser.parse_args()
    set_up_logging(debug=False)
    if arguments.gguf is not None and arguments.teacher is None:
        parser.error("--gguf needs --teacher, whose tokenizer encodes the requests")
    with tempfile.TemporaryDirectory() as temporary:
        workers = list(start_workers(arguments, find_model_folder(arguments.model), Path(temporary)))
        entries = measure(workers, arguments.repetitions)
    report = {"machine": describe_machine("cpu"), "threads": arguments.threads, "num_tokens": NUM_TOKENS}
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "entries": entries}, indent=2)
    write_file(arguments.output / "benchmark_shell.json", text + "\n")
    rows = [
        [
            f"{one['model']} {one['engine']} {one['precision']}",
            f"{one['milliseconds']:.1f}",
            f"{one['bytes'] / 1e6:.1f}",
        ]
        for one in entries
    ]
    print(format_table([["", "ms per answer", "MB"], *rows]))
    print(f"Wrote {arguments.output / 'benchmark_shell.json'}")


def measure(workers, num_repetitions):
    """Time all models in turn at each request; the first round warms them up."""
    for repetition in range(num_repetitions + 1):
        for place in range(len(REQUESTS)):
            for entry, worker, inputs in workers:
                seconds = worker.token_seconds(inputs[place], NUM_TOKENS)
                if repetition:
                    entry.setdefault("seconds", []).append(seconds[-1])
    for entry, worker, _ in workers:
        worker.close()
        entry["milliseconds"] = 1000 * statistics.median(entry["seconds"])
    return [entry for entry, *_ in workers]


if __name__ == "__main__":
    main()
