# SPDX-License-Identifier: Apache-2.0
"""Put benchmarks into speed_results.json, and write the tables and the figure of docs/speed.md.

    encdec-slm bench --preset 330m --cpu-time --settings 128:32 --settings 512:32 --settings 2048:8 --settings 4096:8
    python examples/speed_results.py --benchmark outputs/benchmark/benchmark.json [--gguf FILE] [--profile GRAPH ...]

Several benchmarks of one preset may be given, and replace earlier results of the same models. Measures how fast this
machine multiplies matrices with one thread, too. With --gguf, a decoder-only model in llama.cpp is timed at the same
lengths; this needs `llama-cpp-python`. With --profile, onnxruntime times the operators of a decoding step, of
decoder_with_past_model.onnx or model.onnx in the folders that `bench` wrote. Without options, the page is written
again from speed_results.json.
"""

import argparse
import json
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from evidence_measures import count_training_flops
from shell_results import update_blocks

from encdec_slm.benchmarks.contenders import BASELINE, OURS, load_config
from encdec_slm.benchmarks.machine import Worker, memory_bandwidth
from encdec_slm.benchmarks.measuring import NUM_BUFFER_VALUES
from encdec_slm.checkpoints import write_file
from encdec_slm.generation_speed import decode_rate
from encdec_slm.run_results import format_table


ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "examples" / "speed_results.json", ROOT / "docs" / "speed.md"
MATRIX_SIZE, NUM_PRODUCTS = 2048, 7
LENGTH, MEMORY_LENGTH, NUM_ANSWER_TOKENS = "512", "2048", 64
ENGINES = {
    **{"transformers": "transformers", "ctranslate2": "CTranslate2", "onnxruntime": "onnxruntime"},
    **{"openvino": "OpenVINO", "onnxruntime_genai": "onnxruntime-genai", "llama.cpp": "llama.cpp"},
}
OPERATORS = {
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"), "products with weights"),
    **dict.fromkeys(("FusedMatMul", "MatMul", "Softmax"), "attention"),
    **{"Concat": "growing the cache", "If": None},
}
COLORS = {OURS: "tab:blue", BASELINE: "tab:orange"}
STYLES = {"float32": "-", "int8": "--", "int4": ":"}
# Of a decoder-only baseline in the same engine and precision; of the bandwidth; and of int8 in the same engine.
TARGETS = {"first token": 0.65, "memory": 0.84, "bandwidth": 0.7, "int4": 1.5}


# Measurements


def measure_operations():
    """Return the operations per second of CPU time in products of matrices, by type.

    float32 is multiplied by onnxruntime, because torch is half as fast on processors of AMD.
    """
    torch.set_num_threads(1)
    matrix, integers = np.ones((MATRIX_SIZE, MATRIX_SIZE), np.float32), torch.ones(MATRIX_SIZE, MATRIX_SIZE).char()
    product = build_product()
    calls = {
        "float32": lambda: product.run(None, {"first": matrix, "second": matrix}),
        "int8": lambda: torch._int_mm(integers, integers),
    }
    rates = {}
    for dtype, multiply in calls.items():
        seconds = []
        for _ in range(NUM_PRODUCTS):
            start = time.process_time()
            multiply()
            seconds.append(time.process_time() - start)
        rates[dtype] = 2 * MATRIX_SIZE**3 / median(seconds)
    return rates


def build_product():
    """Build a session of onnxruntime that multiplies two float32 matrices."""
    import onnxruntime
    from onnx import TensorProto, helper

    shape = [MATRIX_SIZE, MATRIX_SIZE]
    inputs, (output,) = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
        for names in (("first", "second"), ("product",))
    )
    node = helper.make_node("MatMul", ["first", "second"], ["product"])
    graph = helper.make_graph([node], "product", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def collect(reports):
    """Return one row for each model in an engine, with medians over the runs of all reports."""
    if len({one["preset"] for one in reports}) > 1 or not all(one["is_cpu_time"] for one in reports):
        raise ValueError("The benchmarks must have the same --preset, and --cpu-time.")
    rows, runs = {}, defaultdict(list)
    for report in reports:
        bandwidth = median(value for group in report["groups"] for value in group["bandwidth"])
        for one in report["rows"]:
            facts = {key: one[key] for key in ("model", "engine", "precision")}
            row = rows.setdefault(one["name"], {**facts, "bandwidth": bandwidth, "settings": {}})
            for place, (length, _) in enumerate(report["settings"]):
                result = one["settings"][place]
                facts = {"bytes_per_token": result["bytes_read_per_token"]}
                facts["memory"] = result["peak_bytes"] - one["bytes_before"]
                row["settings"].setdefault(str(length), facts)
                for group in report["groups"]:
                    runs[one["name"], str(length)] += group["token_seconds"].get(one["name"], [[]] * (place + 1))[
                        place
                    ]
    for (name, length), seconds in runs.items():
        rows[name]["settings"][length] |= summarize_runs(seconds)
    return list(rows.values())


def summarize_runs(runs):
    return {
        "first_token_seconds": median(run[0] for run in runs),
        "tokens_per_second": median(map(decode_rate, runs)),
    }


def time_llama_cpp(path, lengths, num_new_tokens=16, num_repetitions=2):
    """Return the row of a GGUF file, which is read whole for each token."""
    from benchmark_shell import load_llama_cpp

    num_tokens = max(map(int, lengths)) + num_new_tokens
    worker = Worker(path.stem, partial(load_llama_cpp, path, 1, num_tokens, time.process_time), "cpu", ("llama_cpp",))
    settings = {}
    for length in lengths:
        # Another source each time, because llama.cpp keeps what it has read.
        sources = torch.randint(1000, 30_000, (num_repetitions, int(length))).tolist()
        seconds = [worker.token_seconds(source, num_new_tokens) for source in sources]
        memory = worker.peak_bytes() - worker.bytes_before
        settings[length] = {"bytes_per_token": path.stat().st_size, "memory": memory, **summarize_runs(seconds)}
    worker.close()
    bandwidth = memory_bandwidth(torch.ones(NUM_BUFFER_VALUES), time.process_time)
    model, _, precision = path.stem.rpartition("-")
    return {
        **{"model": model, "engine": "llama.cpp", "precision": precision},
        **{"bandwidth": bandwidth, "settings": settings},
    }


def profile_step(path, num_runs=30):
    """Return the row of a graph: the seconds of a decoding step by kind of operator, of each node the fastest run."""
    import onnxruntime

    length, options = int(LENGTH), onnxruntime.SessionOptions()
    options.enable_profiling, options.intra_op_num_threads = True, 1
    sizes = defaultdict(lambda: length, batch_size=1, length=1, target_length=1, total_length=length + 1)
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "step"))
        session, feeds = onnxruntime.InferenceSession(path, options), {}
        for one in session.get_inputs():
            shape = [size if isinstance(size, int) else sizes[size] for size in one.shape]
            feeds[one.name] = np.ones(shape, np.float32 if one.type == "tensor(float)" else np.int64)
        for _ in range(num_runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs, seconds = defaultdict(list), Counter()
    for event in events:
        if event["name"].endswith("_kernel_time"):
            runs[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e6)
    for (operator, _), values in runs.items():
        seconds[OPERATORS.get(operator, "other operators")] += min(values)
    del seconds[None]  # contains the others
    return {"graph": f"{path.parent.name}/{path.name}", "seconds": seconds}


# Limits


@cache
def count_flops(model, preset, source_length, num_new_tokens):
    """Return the operations of an answer; the output head of a decoder-only model is not run for the source."""
    config = load_config(model, preset)
    if model == OURS:
        return count_training_flops(config, [(source_length, num_new_tokens)]) // 3
    unused = 2 * (source_length - 1) * config.vocab_size * config.hidden_size
    return count_training_flops(config, [(source_length - 1, num_new_tokens)]) // 3 - unused


def first_token_limit(results, row, length):
    """Return the seconds of the arithmetic for the first token; with int8 weights, as if all of it were in int8."""
    kind = "float32" if row["precision"] == "float32" else "int8"
    return count_flops(row["model"], results["preset"], int(length), 1) / results["operations"][kind]


def decode_limit(row, length):
    return row["bandwidth"] / row["settings"][length]["bytes_per_token"]


def answer_seconds(setting):
    return setting["first_token_seconds"] + (NUM_ANSWER_TOKENS - 1) / setting["tokens_per_second"]


def find_pairs(results):
    """Return our rows, each with that of the baseline in the same engine and precision, or `None`."""
    rows = {(row["model"], row["engine"], row["precision"]): row for row in results["rows"]}
    ours = sorted(
        (row for row in results["rows"] if row["model"] == OURS), key=lambda row: list(ENGINES).index(row["engine"])
    )
    return [(row, rows.get((BASELINE, row["engine"], row["precision"]))) for row in ours]


def find_peers(results):
    return [row for row in results["rows"] if row["model"] not in (OURS, BASELINE)]


# The page


def engine_table(results):
    header = ["engine", "weights", "first token", "baseline", "ratio", "limit", "decode", "baseline", "limit"]
    table = [[*header, "reached", "memory", "baseline", "ratio"]]
    for row, base in find_pairs(results):
        limit = decode_limit(row, LENGTH)
        table.append(
            [
                *(ENGINES[row["engine"]], row["precision"]),
                *compare(row, base, LENGTH, "first_token_seconds", 1e3, "{:,.0f} ms"),
                f"{1000 * first_token_limit(results, row, LENGTH):,.0f} ms",
                *compare(row, base, LENGTH, "tokens_per_second", 1, "{:.1f}/s")[:2],
                *(f"{limit:.0f}/s", f"{row['settings'][LENGTH]['tokens_per_second'] / limit:.0%}"),
                *compare(row, base, MEMORY_LENGTH, "memory", 1e-6, "{:,.0f} MB"),
            ]
        )
    bandwidth, operations = median(row["bandwidth"] for row in results["rows"]), results["operations"]
    note = (
        f"`{results['preset']}` and a decoder-only baseline of the same size, with random weights; {LENGTH} source "
        f"tokens, batch 1, CPU time of one thread of an {results['cpu']}. This core reads {bandwidth / 1e9:.0f} GB/s, "
        f"and does {operations['float32'] / 1e9:.0f} billion operations per second in products of float32 matrices, "
        f"{operations['int8'] / 1e9:.0f} in those of int8. The limits are what these allow our model: operations for "
        "the first token, bytes read for each further one; engines compute a part of int8 models in float. Memory is "
        f"what a process adds at {int(MEMORY_LENGTH):,} source tokens."
    )
    options = {"width": 119, "subsequent_indent": "  ", "break_on_hyphens": False}
    lines = "\n".join(textwrap.fill(f"- {line}", **options) for line in judge(results))
    return f"{format_table(table, markdown=True)}\n\n{textwrap.fill(note, 119)}\n\n{lines}"


def compare(row, base, length, key, factor, form):
    """Return the cells of our value, that of the baseline, and their ratio; empty where nothing was measured."""
    values = [one and one["settings"].get(length, {}).get(key) for one in (row, base)]
    ratio = f"{values[0] / values[1]:.2f}" if all(values) else ""
    return [*(form.format(factor * value) if value else "" for value in values), ratio]


def length_table(results):
    lengths = list_lengths(results)
    table = [["engine", "weights", *(f"{int(length):,}" for length in lengths)]]
    flops = [
        [count_flops(model, results["preset"], int(length), NUM_ANSWER_TOKENS) / 1e9 for model in (OURS, BASELINE)]
        for length in lengths
    ]
    table.append(["billion operations", "", *("{:,.0f} / {:,.0f}".format(*pair) for pair in flops)])
    for group in (*find_pairs(results), *zip(find_peers(results))):
        row = group[0]
        name = ENGINES[row["engine"]] if row["model"] == OURS else f"{row['model']}, {row['engine']}"
        table.append([name, row["precision"], *(format_answers(group, length) for length in lengths)])
    note = f"CPU seconds of an answer of {NUM_ANSWER_TOKENS} tokens, by source tokens: our model / the baseline."
    return f"{format_table(table, markdown=True)}\n\n{note}"


def step_table(results):
    kinds = list(results["steps"][0]["seconds"])
    table = [["graph", *(f"{kind}, ms" for kind in kinds), "step, ms"]]
    for step in results["steps"]:
        seconds = [*(step["seconds"][kind] for kind in kinds), sum(step["seconds"].values())]
        table.append([f"`{step['graph']}`", *(f"{1000 * value:.2f}" for value in seconds)])
    return format_table(table, markdown=True)


def list_lengths(results):
    return sorted({length for row in results["rows"] for length in row["settings"]}, key=int)


def format_answers(rows, length):
    settings = [row["settings"].get(length) for row in rows if row is not None]
    return " / ".join(f"{answer_seconds(setting):.1f}" for setting in settings if setting is not None)


def judge(results):
    """Yield one line for each target: what was measured, and whether it is reached."""
    pairs = find_pairs(results)
    for name, length, key in (("first token", LENGTH, "first_token_seconds"), ("memory", MEMORY_LENGTH, "memory")):
        cells = {(row["engine"], row["precision"]): compare(row, base, length, key, 1, "{}") for row, base in pairs}
        ratios = {
            f"{ENGINES[engine]} {precision}": float(ours) / float(base)
            for (engine, precision), (ours, base, ratio) in cells.items()
            if ratio
        }
        missed = [f"{ratio:.3f} ({engine})" for engine, ratio in ratios.items() if ratio > TARGETS[name]]
        measured = f"missed: {', '.join(missed)}" if missed else "reached in all engines"
        yield f"{name} at most {TARGETS[name]} x the baseline: {measured}; median {median(ratios.values()):.2f}."
    for precision in ("float32", "int8"):
        shares = {
            ENGINES[row["engine"]]: row["settings"][LENGTH]["tokens_per_second"] / decode_limit(row, LENGTH)
            for row, _ in pairs
            if row["precision"] == precision
        }
        if shares:
            best = max(shares, key=shares.get)
            verdict = format_verdict(shares[best] >= TARGETS["bandwidth"])
            share = f"{shares[best]:.0%} ({best})"
            yield f"decoding at {TARGETS['bandwidth']:.0%} of the bandwidth, {precision}: {verdict}; {share}."
    rates = {(row["engine"], row["precision"]): row["settings"][LENGTH]["tokens_per_second"] for row, _ in pairs}
    for (engine, precision), rate in rates.items():
        if precision == "int4":
            ratio = rate / rates[engine, "int8"]
            verdict = format_verdict(ratio >= TARGETS["int4"])
            yield f"int4 at least {TARGETS['int4']} x int8: {verdict}; {ratio:.2f} x ({ENGINES[engine]})."
    if usual := [base for row, base in pairs if row["engine"] == "transformers" and base is not None]:
        yield compare_with_paper(pairs, usual[0]["settings"][LENGTH])


def compare_with_paper(pairs, usual):
    words = []
    for key, label, best in (
        ("first_token_seconds", "time to the first token", min),
        ("tokens_per_second", "decode rate", max),
    ):
        row = best((row for row, _ in pairs), key=lambda row, key=key: row["settings"][LENGTH][key])
        ratio = row["settings"][LENGTH][key] / usual[key]
        words.append(f"{ratio:.2f} x the {label} ({ENGINES[row['engine']]} {row['precision']})")
    return (
        f"our best engine against the baseline in transformers: {' and '.join(words)}; "
        "[arXiv 2501.16273](https://arxiv.org/abs/2501.16273) reports 0.53 and 4.7."
    )


def format_verdict(is_met):
    return "reached" if is_met else "missed"


BLOCKS = {"engines": engine_table, "lengths": length_table, "steps": step_table}


def draw_figure(results):
    """Draw first token and CPU seconds of an answer by source length: a column for each engine, and the limits."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    engines = [engine for engine in ENGINES if any(row["engine"] == engine for row in results["rows"])]
    figure = Figure(figsize=(2.6 * len(engines), 6), layout="constrained")
    all_axes = figure.subplots(2, len(engines), sharex=True, sharey="row")
    for row in results["rows"]:
        draw_row(all_axes[:, engines.index(row["engine"])], results, row)
    for axes, engine in zip(all_axes[0], engines, strict=True):
        axes.set_title(ENGINES[engine])
    for axes, label in zip(all_axes[:, 0], ("first token", f"answer of {NUM_ANSWER_TOKENS} tokens"), strict=True):
        axes.set_ylabel(f"{label}, CPU seconds")
    lengths = list_lengths(results)
    for axes in all_axes[1]:
        axes.set_xlabel("source tokens")
        axes.set_xticks(list(map(int, lengths)), lengths)
        axes.minorticks_off()
    names = {OURS: OURS, BASELINE: "decoder-only baseline"}
    names |= {row["model"]: f"{row['model']} {row['precision']}" for row in find_peers(results)}
    legend = [Line2D([], [], color=COLORS.get(model, "black"), label=name) for model, name in names.items()]
    legend += [Line2D([], [], color="gray", linestyle=style, label=label) for label, style in STYLES.items()]
    legend.append(Line2D([], [], color="gray", linewidth=4, alpha=0.25, label="limit of arithmetic and bandwidth"))
    figure.legend(handles=legend, loc="outside upper center", ncols=4)
    return figure


def draw_row(panels, results, row):
    lengths = sorted(row["settings"], key=int)
    settings = [row["settings"][length] for length in lengths]
    curves = [[one["first_token_seconds"] for one in settings], list(map(answer_seconds, settings))]
    limits = [[], []]
    if row["model"] in COLORS:
        limits[0] = [first_token_limit(results, row, length) for length in lengths]
        steps = ((NUM_ANSWER_TOKENS - 1) / decode_limit(row, length) for length in lengths)
        limits[1] = list(map(sum, zip(limits[0], steps, strict=True)))
    look = {"color": COLORS.get(row["model"], "black"), "linestyle": STYLES.get(row["precision"], "-")}
    for axes, curve, limit in zip(panels, curves, limits, strict=True):
        axes.loglog(list(map(int, lengths)), curve, marker=".", **look)
        if limit:
            axes.loglog(list(map(int, lengths)), limit, linewidth=4, alpha=0.25, **look)
        axes.grid(alpha=0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", type=Path, nargs="*", default=[], metavar="FILE", help="of one preset")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="decoder-only model, named MODEL-PRECISION.gguf")
    parser.add_argument("--profile", type=Path, nargs="*", default=[], metavar="GRAPH", help="ONNX file of a step")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = []
    if arguments.benchmark:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.benchmark]
        results |= {"preset": reports[0]["preset"], "cpu": reports[0]["machine"]["cpu"]}
        results["operations"], rows = measure_operations(), collect(reports)
    if arguments.gguf is not None:
        rows.append(time_llama_cpp(arguments.gguf, list_lengths({"rows": rows or results["rows"]})))
    names = [[row[key] for key in ("model", "engine", "precision")] for row in rows]
    kept = [row for row in results["rows"] if [row[key] for key in ("model", "engine", "precision")] not in names]
    results["rows"] = kept + rows
    if arguments.profile:
        results["steps"] = [profile_step(path) for path in arguments.profile]
    if rows or arguments.profile:
        write_file(RESULTS, json.dumps(results, indent=1) + "\n")
    write_file(PAGE, update_blocks(PAGE.read_text(encoding="utf-8"), BLOCKS, results))
    write_file(PAGE.with_suffix(".png"), lambda path: draw_figure(results).savefig(path, format="png", dpi=90))


if __name__ == "__main__":
    main()
