# SPDX-License-Identifier: Apache-2.0
"""Export the shell model in every format and precision, compare answers with transformers, and write docs/export.md.

    python examples/benchmark_export.py [--rows test_random.jsonl] [--node FOLDER]

ROWS is a file with requests (`source`) and commands (`target`), of which the first 100 are used. All engines answer
each request in turn, by greedy search with one thread; times are CPU times, which other programs on the machine change
little. Engines that are not installed are skipped. FOLDER is where `npm install @huggingface/transformers` was run,
for transformers.js. Exports are written to outputs/benchmark_export, and results to export_results.json beside this
script. Without ROWS, the table is written again from that file.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import textwrap
import time
from importlib.metadata import version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import torch
from shell_demo import REQUESTS
from shell_results import update_blocks
from transformers import AutoConfig, AutoTokenizer

from encdec_slm import export
from encdec_slm.benchmarks.contenders import ITEM_BYTES
from encdec_slm.benchmarks.machine import describe_machine
from encdec_slm.checkpoints import load_checkpoint, write_file
from encdec_slm.configuration.sizes import num_parameters
from encdec_slm.run_results import format_table
from encdec_slm.trainers.evaluation import evaluate_checkpoint


ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "examples" / "export_results.json", ROOT / "docs" / "export.md"
MODEL = ROOT / "checkpoints" / "shell"
EXPORTS = Path("outputs", "benchmark_export").absolute()
NUM_ROWS, NUM_WARM_UP_ROWS = 100, 2
TYPES = ("float32", "float16", "int8", "int4")
JS_LIMITS = "beams; stop strings; the end token of a source that is cut; images"
# Label -> package, format, precisions, and what does not work. OpenVINO reads float32 and converts it.
ENGINES = {
    "transformers": ("transformers", "", ("float32", "bfloat16"), ""),
    "CTranslate2": (
        *("ctranslate2", "ctranslate2", ("float32", "int8")),
        "int4; some settings of beams ([below](#what-ctranslate2-does-differently)); images",
    ),
    "onnxruntime": ("onnxruntime", "onnx", ("float32", "int8", "int8_static"), "float16 and int4"),
    "OpenVINO": ("openvino", "onnx", ("float32", "bfloat16", "int8"), "int4; int8 exports"),
    "transformers.js": ("", "transformers-js", TYPES, JS_LIMITS),
    "onnxruntime-genai": (
        *("onnxruntime-genai", "ort-genai", TYPES),
        "padding on the left; stop strings; a second `append_tokens` (an error); images",
    ),
    "OpenVINO GenAI": (
        *("openvino-genai", "openvino-genai", ("float32", "bfloat16", "float16", "int8")),
        "batches whose rows end at different times, unless `ignore_eos=True`; `start_chat`; `qk_norm` and int4 "
        "(refused); images",
    ),
}
NODE_SCRIPT = """
import { createInterface } from 'node:readline';
import { AutoModelForSeq2SeqLM, env, Tensor } from '@huggingface/transformers';
const [root, name, max_new_tokens] = process.argv.slice(1);
env.localModelPath = root;
env.allowRemoteModels = false;
const session_options = { intraOpNumThreads: 1, interOpNumThreads: 1 };
const model = await AutoModelForSeq2SeqLM.from_pretrained(name, { dtype: 'auto', session_options });
const tensor = (ids) => new Tensor('int64', BigInt64Array.from(ids.map(BigInt)), [1, ids.length]);
for await (const line of createInterface({ input: process.stdin })) {
  const ids = JSON.parse(line), start = process.cpuUsage();
  const inputs = { inputs: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
  const output = await model.generate({ ...inputs, max_new_tokens: Number(max_new_tokens) });
  const { user, system } = process.cpuUsage(start);
  console.log(JSON.stringify([output.tolist()[0].slice(1).map(Number), (user + system) / 1e6]));
}
"""


# Engines: functions that return a target for source ids


def load_generate(label, folder, precision, max_new_tokens):
    loaders = {
        "transformers": lambda: load_checkpoint(MODEL, dtype=getattr(torch, precision), device="cpu")[0],
        "CTranslate2": lambda: export.CT2EncDecSLM.from_pretrained(folder, intra_threads=1),
        "onnxruntime": lambda: export.OrtEncDecSLM.from_pretrained(folder),
        "OpenVINO": lambda: export.OpenVINOEncDecSLM.from_pretrained(folder, precision=precision),
    }
    model = loaders[label]()
    options = {"num_beams": 1, "do_sample": False, "length_penalty": 1.0, "max_new_tokens": max_new_tokens}

    @torch.inference_mode()
    def answer(ids):
        ids = torch.tensor([ids])
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist()

    return answer


def load_ort_genai(folder, max_new_tokens):
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    model = onnxruntime_genai.Model(config)

    def answer(ids):
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + max_new_tokens, num_beams=1)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[len(ids) :].tolist()

    return answer


def load_openvino_genai(folder, precision, max_new_tokens):
    import openvino
    import openvino_genai

    hint = "bf16" if precision == "bfloat16" else "f32"
    options = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **options)
    config = pipeline.get_generation_config()
    config.num_beams, config.max_new_tokens = 1, max_new_tokens

    def answer(ids):
        tensors = [openvino.Tensor(torch.tensor([row]).numpy()) for row in (ids, [1] * len(ids))]
        return list(pipeline.generate(openvino_genai.TokenizedInputs(*tensors), config).tokens[0])

    return answer


def load_node(node_folder, folder, max_new_tokens):
    """Start a Node process; its function returns the seconds of CPU time of that process, too."""
    command = ["node", "--input-type=module", "-e", NODE_SCRIPT, f"{folder.parent}/", folder.name, str(max_new_tokens)]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=node_folder, text=True, bufsize=1, **pipes)

    def answer(ids):
        process.stdin.write(json.dumps(ids) + "\n")
        return tuple(json.loads(process.stdout.readline()))

    return answer


def load_answers(label, folders, max_new_tokens, node_folder):
    """Return a function from a precision and source ids to a target and its seconds of CPU time."""
    loaders = {
        "transformers.js": lambda precision, folder: load_node(node_folder, folder, max_new_tokens),
        "onnxruntime-genai": lambda precision, folder: load_ort_genai(folder, max_new_tokens),
        "OpenVINO GenAI": lambda precision, folder: load_openvino_genai(folder, precision, max_new_tokens),
    }
    load = loaders.get(label, lambda precision, folder: load_generate(label, folder, precision, max_new_tokens))
    answers = {precision: load(precision, folder) for precision, folder in folders.items()}

    def answer(precision, ids):
        start = time.process_time()
        found = answers[precision](ids)
        return found if isinstance(found, tuple) else (found, time.process_time() - start)

    return answer


# Measure


def find_folder(label, precision):
    """Return the folder of an export. OpenVINO converts float32 exports when it loads them."""
    is_converted = label == "OpenVINO" or (label, precision) == ("OpenVINO GenAI", "bfloat16")
    return EXPORTS / f"{ENGINES[label][1]}-{'float32' if is_converted else precision}"


def write_exports(labels):
    shutil.rmtree(EXPORTS, ignore_errors=True)  # they may be those of another model
    for label in labels:
        _, format, precisions, _ = ENGINES[label]
        for precision in precisions if format else ():
            folder, precision = (folder := find_folder(label, precision)), folder.name.removeprefix(f"{format}-")
            if not folder.exists():
                options = {"calibration": REQUESTS} if precision == "int8_static" else {}
                options["quantization"] = None if format != "ctranslate2" and precision == "float32" else precision
                getattr(export, f"export_{format.replace('-', '_')}")(MODEL, folder, **options)


def find_version(package, node_folder):
    """Return the version of an installed engine, or None."""
    if package:
        return version(package) if find_spec(package.replace("-", "_")) else None
    path = node_folder and node_folder / "node_modules/@huggingface/transformers/package.json"
    return path and json.loads(path.read_text(encoding="utf-8"))["version"]


def measure(rows_file, node_folder):
    tokenizer, generation = AutoTokenizer.from_pretrained(MODEL), load_checkpoint(MODEL)[0].generation_config
    versions = {label: find_version(engine[0], node_folder) for label, engine in ENGINES.items()}
    versions = {label: found for label, found in versions.items() if found}
    write_exports(versions)
    torch.set_num_threads(1)
    entries, engines, num_weights = [], {}, num_parameters(AutoConfig.from_pretrained(MODEL))
    for label, engine_version in versions.items():
        folders = {precision: find_folder(label, precision) for precision in ENGINES[label][2]}
        engines[label] = load_answers(label, folders, generation.max_length - 1, node_folder)
        for name, path in folders.items():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            entries.append({"engine": label, "version": engine_version, "precision": name})
            entries[-1]["bytes"] = size or ITEM_BYTES[name] * num_weights
    lines = rows_file.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    sources = [json.loads(line)["source"] for line in lines]
    answers = [[] for _ in entries]
    inputs = tokenizer(sources, truncation=True)["input_ids"]
    for ids in inputs[:NUM_WARM_UP_ROWS] + inputs:
        for entry, found in zip(entries, answers, strict=True):
            found.append(engines[entry["engine"]](entry["precision"], ids))
    rows = [[cut(ids, generation.eos_token_id) for ids, _ in found[NUM_WARM_UP_ROWS:]] for found in answers]
    for entry, found, ids in zip(entries, answers, rows, strict=True):
        entry["milliseconds"] = 1000 * statistics.median(seconds for _, seconds in found[NUM_WARM_UP_ROWS:])
        pairs = list(zip(ids, rows[0], strict=True))
        tokens = [one == other for pair in pairs for one, other in zip_longest(*pair)]
        entry["equal_tokens"] = 100 * sum(tokens) / len(tokens)
        entry["equal_answers"] = 100 * sum(one == other for one, other in pairs) / len(pairs)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        entry["nlc2cmd"] = score(dict(zip(sources, texts, strict=True)), lines)
    return {"machine": describe_machine("cpu"), "rows": [rows_file.name, len(sources)], "entries": entries}


def cut(ids, eos_token_id):
    """Cut a target before its end token, which some engines do not return."""
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids


def score(answers, lines):
    """Return the NLC2CMD score, and its interval."""

    def look_up(requests):
        return [answers[request] for request in requests]

    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder, "rows.jsonl")
        rows_file.write_text("\n".join(lines), encoding="utf-8")
        results = evaluate_checkpoint(look_up, "shell", dataset_name=rows_file, show_progress=False)
    metric = results.saved.metrics["nlc2cmd"]
    return [metric.value, metric.low, metric.high]


# Table


def export_table(results):
    header = ("engine", "`--format`", "weights", "MB", "equal tokens", "equal answers", "NLC2CMD", "CPU ms per answer")
    rows, named = [[*header, "what does not work"]], set()
    for entry in results["entries"]:
        label = entry["engine"]
        _, format, _, limits = ENGINES[label]
        names = [f"{label} {entry['version']}", format and f"`{format}`"]
        shares = [f"{entry[name]:.1f} %" for name in ("equal_tokens", "equal_answers")]
        numbers = [f"{entry['bytes'] / 1e6:.1f}", *shares]
        numbers += [f"{value:.1f}" for value in (entry["nlc2cmd"][0], entry["milliseconds"])]
        first, last = (["", ""], "") if label in named else (names, limits)
        rows.append([*first, entry["precision"], *numbers, last])
        named.add(label)
    (name, num_rows), cpu = results["rows"], results["machine"]["cpu"]
    low, high = results["entries"][0]["nlc2cmd"][1:]
    note = (
        f"Greedy answers of the shell model to the first {num_rows} requests of `{name}`. Equal means equal to those "
        f"of transformers in float32, whose score has the 95 % interval {low:.1f} to {high:.1f}. Times are medians of "
        f"CPU time with one thread of an {cpu}. MB are those of the whole folder, or of the weights for transformers. "
        "OpenVINO reads a float32 export in bfloat16, its default on CPUs that have it, and in int8 (`onnx`). "
        "int8_static was calibrated on six requests."
    )
    table = format_table(rows, markdown=True).replace("---: |\n", "--- |\n", 1)
    return f"{table}\n\n{textwrap.fill(note, 119)}"


BLOCKS = {"formats": export_table}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="FILE")
    parser.add_argument("--node", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.rows is not None:
        results = measure(arguments.rows, arguments.node)
        write_file(RESULTS, json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_file(PAGE, update_blocks(PAGE.read_text(encoding="utf-8"), BLOCKS, results))


if __name__ == "__main__":
    main()
