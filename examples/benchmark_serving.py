# SPDX-License-Identifier: Apache-2.0
"""Time 32 concurrent requests in vLLM and in CTranslate2, and a decoder-only baseline of equal size in the same vLLM.

    python examples/benchmark_serving.py [--preset 26m] [--output outputs/benchmark_serving.json]

Needs an environment with vLLM, CTranslate2 and this package. A request has 16 to 256 tokens of source and gets 32 new
ones, by greedy search; weights are random, and nothing ends early. vLLM has up to 32 requests in work: it starts the
next when one ends. CTranslate2 gets batches of 32, sorted by length. Each model runs in its own process
with one thread, and all take turns. Measured is CPU time, so other work on the machine does not count. Prints the
medians, and writes them with all times to a file.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from encdec_slm.benchmarks.contenders import BASELINE, OURS, Contender
from encdec_slm.benchmarks.engines import find_bundle_folder, prepare
from encdec_slm.benchmarks.machine import Worker, describe_machine, run_in_new_process
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration.sizes import num_parameters
from encdec_slm.errors import require_package
from encdec_slm.run_results import format_table


CONCURRENCY = 32
SOURCE_LENGTHS, NUM_TOKENS = (16, 256), 32
ENGINES = ((OURS, "vllm"), (BASELINE, "vllm"), (OURS, "ctranslate2"))
PRECISIONS = {"vllm": ("float32", "bfloat16"), "ctranslate2": ("float32", "int8")}


def save_model(contender, folder):
    """Save a model with random weights, and a tokenizer, without which vLLM does not start."""
    contender.build_model(torch.float32).save_pretrained(folder)
    vocab = {f"<id_{token_id}>": token_id for token_id in range(contender.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<id_0>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<id_0>").save_pretrained(folder)


def load_vllm(contender, folder, enforce_eager):
    """Return the function that times vLLM, which works in this process, so that its CPU time is known."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    vllm = require_package("vllm")
    options = {"max_num_seqs": CONCURRENCY, "max_model_len": 512, "kv_cache_memory_bytes": 2**29}
    options["enable_prefix_caching"] = False  # every repetition reads all sources anew
    engine = vllm.LLM(str(folder), dtype=contender.precision, enforce_eager=enforce_eager, **options)
    fixed = {"temperature": 0, "ignore_eos": True, "detokenize": False}

    def generate(sources, num_new_tokens):
        prompts = [{"prompt_token_ids": source_ids} for source_ids in sources]
        parameters = vllm.SamplingParams(max_tokens=num_new_tokens, **fixed)
        return [output.outputs[0].token_ids for output in engine.generate(prompts, parameters, use_tqdm=False)]

    return partial(time_requests, generate)


def load_ctranslate2(contender, folder):
    """Return the function that times CTranslate2."""
    options = {"compute_type": contender.precision, "intra_threads": 1, "inter_threads": 1}
    translator = require_package("ctranslate2").Translator(str(folder), **options)

    def generate(sources, num_new_tokens):
        lengths = dict.fromkeys(("max_decoding_length", "min_decoding_length"), num_new_tokens)
        tokens = [[f"<id_{token_id}>" for token_id in source_ids] for source_ids in sources]
        results = translator.translate_batch(tokens, max_batch_size=CONCURRENCY, beam_size=1, **lengths)
        return [result.hypotheses[0] for result in results]

    return partial(time_requests, generate)


def time_requests(generate, sources, num_new_tokens):
    start = time.process_time()
    targets = generate(sources, num_new_tokens)
    seconds = time.process_time() - start
    assert all(len(target) == num_new_tokens for target in targets)
    return [seconds]


def start_workers(arguments, temporary):
    """Start a process for each model in each engine and precision; yields its entry in the report, and the worker."""
    for model, engine in ENGINES:
        for precision in filter(arguments.precisions.__contains__, PRECISIONS[engine]):
            contender = Contender(model, engine, precision, "cpu", arguments.preset)
            if engine == "ctranslate2":
                folder, load = find_bundle_folder(contender, temporary), load_ctranslate2
                run_in_new_process(prepare, contender, temporary)
            else:
                folder, load = temporary / model, partial(load_vllm, enforce_eager=arguments.enforce_eager)
                run_in_new_process(save_model, contender, folder)
            entry = {"model": model, "engine": engine, "precision": precision, "seconds": []}
            entry["num_parameters"] = num_parameters(contender.config)
            yield entry, Worker(contender.name, partial(load, contender, folder), "cpu", (engine,))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="26m", help="size of the encoder-decoder and of its baseline")
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"], help="float32, bfloat16 and int8")
    parser.add_argument("--enforce-eager", action="store_true", help="vLLM without compilation, for both models")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of all requests")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_serving.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    generator = random.Random(0)
    sources = [
        generator.choices(range(3, 1000), k=generator.randint(*SOURCE_LENGTHS)) for _ in range(arguments.requests)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        workers = list(start_workers(arguments, Path(temporary)))
        for repetition in range(arguments.repetitions + 1):  # the first warms up
            for entry, worker in workers:
                seconds = worker.token_seconds(sources, NUM_TOKENS)
                entry["seconds"] += seconds if repetition else []
        for entry, worker in workers:
            entry["peak_bytes"] = worker.peak_bytes()
            worker.close()
    report = {"machine": describe_machine("cpu"), "preset": arguments.preset, "num_requests": len(sources)}
    entries = [entry for entry, _ in workers]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output, json.dumps({**report, "entries": entries}, indent=2) + "\n")
    rows = [["model", "engine", "precision", "tokens per CPU second", "CPU ms per request"]]
    for entry in entries:
        seconds = statistics.median(entry["seconds"])
        speed, latency = len(sources) * NUM_TOKENS / seconds, 1000 * seconds / len(sources)
        rows.append([entry["model"], entry["engine"], entry["precision"], f"{speed:.0f}", f"{latency:.1f}"])
    print(format_table(rows, markdown=True))


if __name__ == "__main__":
    main()
