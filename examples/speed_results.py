# SPDX-License-Identifier: Apache-2.0
"""Put benchmarks into speed_results.json, and write the table of one thread in docs/speed.md.

    encdec-slm bench --preset 330m --cpu-time --settings 512:64 --settings 2048:32
    python examples/speed_results.py [--benchmark outputs/benchmark/benchmark.json ...]

The first file has two settings, whose second one is that of the memory. Measures how fast this machine multiplies
float32 matrices with one thread, too. Without --benchmark, the table is written again from speed_results.json.
"""

import argparse
import json
import statistics
import textwrap
import time
from pathlib import Path

import torch
from shell_results import update_blocks

from encdec_slm.benchmarks.contenders import BASELINE, OURS
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import load_preset
from encdec_slm.run_results import format_table


ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "examples" / "speed_results.json", ROOT / "docs" / "speed.md"
MATRIX_SIZE, NUM_PRODUCTS = 2048, 5
# Of a decoder-only baseline in the same engine and precision; of the bandwidth; and of int8 in the same engine.
TARGETS = {"first token": 0.65, "memory": 0.84, "bandwidth": 0.7, "int4": 1.5}


def measure_flops():
    """Return the floating-point operations per second of CPU time in products of float32 matrices."""
    torch.set_num_threads(1)
    matrix, seconds = torch.ones(MATRIX_SIZE, MATRIX_SIZE), []
    for _ in range(NUM_PRODUCTS):
        start = time.process_time()
        matrix @ matrix
        seconds.append(time.process_time() - start)
    return 2 * MATRIX_SIZE**3 / statistics.median(seconds)


def collect(reports):
    report, config = reports[0], load_preset(reports[0]["preset"])
    if any(one["settings"][0] != report["settings"][0] or not one["is_cpu_time"] for one in reports):
        raise ValueError("The benchmarks must have the same first --settings, and --cpu-time.")
    bandwidth = statistics.median(value for one in reports for group in one["groups"] for value in group["bandwidth"])
    all_pairs, rows = [pair for one in reports for pair in one["pairs"]], []
    for row in (row for one in reports for row in one["rows"]):
        short, *long = row["settings"]
        pairs = (pair for pair in all_pairs if pair["ours"] == row["name"] and is_same_engine(pair))
        ratios = next(pairs, {"settings": None})["settings"]
        # A source runs through the encoder and the projections of cross-attention; or through all but the head.
        unread = row["weights_per_token"] if row["model"] == OURS else config.vocab_size * config.hidden_size
        rows.append(
            {
                **{key: row[key] for key in ("model", "engine", "precision")},
                "first_token_seconds": short["first_token_seconds"]["median"],
                "first_token_flops": 2 * report["settings"][0][0] * (row["num_parameters"] - unread),
                "tokens_per_second": short["decode_tokens_per_second"]["median"],
                "bytes_per_token": short["bytes_read_per_token"],
                "memory": long[0]["peak_bytes"] - row["bytes_before"] if long else None,
                "first_token_ratio": ratios and ratios[0]["first_token_seconds"]["median"],
                "memory_ratio": ratios and long and ratios[1]["added_memory"],
            }
        )
    kept = {key: report[key] for key in ("preset", "settings")}
    return {**kept, "cpu": report["machine"]["cpu"], "bandwidth": bandwidth, "flops": measure_flops(), "rows": rows}


def is_same_engine(pair):
    return pair["ours"].partition("/")[2] == pair["opponent"].partition("/")[2]


def speed_table(results):
    header = ["model", "engine", "weights", "first token", "in float32", "of baseline", "decode", "limit", "reached"]
    table = [[*header, "read per token", "memory", "of baseline"]]
    for row in results["rows"]:
        limit = results["bandwidth"] / row["bytes_per_token"]
        table.append(
            [
                *(row["model"], row["engine"], row["precision"]),
                f"{1000 * row['first_token_seconds']:,.0f} ms",
                f"{1000 * row['first_token_flops'] / results['flops']:,.0f} ms",
                format_ratio(row["first_token_ratio"]),
                *(f"{row['tokens_per_second']:.1f}/s", f"{limit:.0f}/s", f"{row['tokens_per_second'] / limit:.0%}"),
                f"{row['bytes_per_token'] / 1e6:.0f} MB",
                "" if row["memory"] is None else f"{row['memory'] / 1e6:,.0f} MB",
                format_ratio(row["memory_ratio"]),
            ]
        )
    (length, num_tokens), (long, _) = results["settings"]
    note = (
        f"`{results['preset']}` with random weights, {length} source tokens, {num_tokens} new tokens, one row, in "
        f"CPU time of one thread of an {results['cpu']}. This core reads {results['bandwidth'] / 1e9:.1f} GB/s and "
        f"multiplies float32 matrices at {results['flops'] / 1e9:.0f} GFLOP/s; the limits are what these allow, "
        f"for the first token in float32 arithmetic. Memory is what a process adds at {long:,} source tokens. The "
        "baseline is decoder-only, in the same engine and precision."
    )
    lines = "\n".join(f"- {line}" for line in judge(results))
    return f"{format_table(table, markdown=True)}\n\n{textwrap.fill(note, 119)}\n\n{lines}"


def format_ratio(ratio):
    return "" if ratio is None else f"{ratio:.2f} x"


def judge(results):
    """Yield one line for each target: what was measured, and whether it is reached."""
    ours = [row for row in results["rows"] if row["model"] != BASELINE]
    for name, key in (("first token", "first_token_ratio"), ("memory", "memory_ratio")):
        ratios = {f"{row['engine']} {row['precision']}": row[key] for row in ours if row[key] is not None}
        measured = ", ".join(f"{ratio:.2f} ({engine})" for engine, ratio in ratios.items())
        is_met = all(ratio <= TARGETS[name] for ratio in ratios.values())
        yield f"{name} at most {TARGETS[name]} x the baseline: {format_verdict(is_met)}; {measured}."
    shares = {
        row["engine"]: row["tokens_per_second"] * row["bytes_per_token"] / results["bandwidth"]
        for row in ours
        if row["precision"] == "int8"
    }
    best, target = max(shares, key=shares.get), TARGETS["bandwidth"]
    measured = f"{shares[best]:.0%} in the best engine ({best})"
    yield f"int8 decoding at {target:.0%} of the bandwidth: {format_verdict(shares[best] >= target)}; {measured}."
    rates, target = {(row["engine"], row["precision"]): row["tokens_per_second"] for row in ours}, TARGETS["int4"]
    for (engine, precision), rate in rates.items():
        if precision == "int4":
            ratio = rate / rates[engine, "int8"]
            yield f"int4 at least {target} x int8: {format_verdict(ratio >= target)}; {ratio:.2f} x ({engine})."


def format_verdict(is_met):
    return "reached" if is_met else "missed"


BLOCKS = {"thread": speed_table}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--benchmark", type=Path, nargs="*", metavar="FILE", help="of one preset and the same settings"
    )
    arguments = parser.parse_args()
    if arguments.benchmark:
        results = collect([json.loads(path.read_text(encoding="utf-8")) for path in arguments.benchmark])
        write_file(RESULTS, json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_file(PAGE, update_blocks(PAGE.read_text(encoding="utf-8"), BLOCKS, results))


if __name__ == "__main__":
    main()
