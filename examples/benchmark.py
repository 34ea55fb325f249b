# SPDX-License-Identifier: Apache-2.0
"""Times a preset against its decoder-only twin: random weights, batch 1, greedy `generate`, both with a cache.

    python examples/benchmark.py --preset 330m --source-length 512 --new-tokens 64 --dtype bfloat16

First token: seconds from source ids to the first generated id, prefill included. Decode rate: the other new tokens by
the seconds that they take. Repetitions of the contenders, of memory bandwidth and of matrix products are interleaved,
so that a busy moment of the machine hits all of them; medians and quartiles are reported. Writes `benchmark.json`
(with every raw time) and `benchmark.png`. Batches, beams and quantized weights are not measured.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from encdec_slm.benchmarks.generation_speed import decode_rate, token_seconds
from encdec_slm.benchmarks.machine import in_new_process, machine, matmul_rate, memory_bandwidth, peak_bytes
from encdec_slm.configuration import decoder_only_twin, list_presets, load_preset
from encdec_slm.configuration.sizes import num_cached_values, num_weights_per_token


@dataclass
class Contender:
    """Something that generates, and what it needs by arithmetic.

    Args:
        name (`str`): Its row in the table.
        num_parameters (`int`): A tied table counts once.
        bytes_per_token (`Callable[[int], int]`): Cached length in tokens -> bytes of weights and cache that one
            generated token reads.
        first_token_flops (`Callable[[int], int]`): Source length in tokens -> floating point operations up to the
            first token.
        token_seconds (`Callable[[torch.LongTensor, int], list[float]]`): Source ids of shape `(1, source_length)` and
            a number of new tokens -> seconds from the call until each of these is known.
    """

    name: str
    num_parameters: int
    bytes_per_token: Callable[[int], int]
    first_token_flops: Callable[[int], int]
    token_seconds: Callable[[torch.LongTensor, int], list[float]]


def encoder_decoder(arguments):
    """The preset itself."""
    model = random_model(AutoModelForSeq2SeqLM, load_preset(arguments.preset), arguments)
    config = model.config
    attention_size = config.encoder_num_hidden_layers * config.num_attention_heads * config.head_dim
    weights = num_weights(model, "encoder.layers.", "cross_attn.k_proj.", "cross_attn.v_proj.")
    step_weights = num_weights_per_token(config)
    return Contender(
        name="encoder-decoder",
        num_parameters=num_weights(model, ""),
        bytes_per_token=lambda length: model.dtype.itemsize * (step_weights + length * num_cached_values(config)),
        first_token_flops=lambda length: 2 * (length * weights + step_weights) + 4 * attention_size * length**2,
        token_seconds=partial(token_seconds, model),
    )


def twin(arguments):
    """The decoder-only model of the same size."""
    preset = load_preset(arguments.preset)
    model = random_model(AutoModelForCausalLM, decoder_only_twin(preset), arguments)
    config = model.config
    if config.model_type == "qwen3" and not preset.qk_norm:
        # Qwen stands in where Llama refuses the shape; norms that our side lacks would cost the twin about 3 %.
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    # A causal mask needs half of all pairs; the last source token is scored by the output head.
    attention_size = config.num_hidden_layers * config.num_attention_heads * config.head_dim / 2
    weights, head_weights = num_weights(model, "model.layers."), config.vocab_size * config.hidden_size
    step_weights = num_weights_per_token(config)
    return Contender(
        name="decoder-only twin",
        num_parameters=num_weights(model, ""),
        bytes_per_token=lambda length: model.dtype.itemsize * (step_weights + length * num_cached_values(config)),
        first_token_flops=lambda length: 2 * (length * weights + head_weights) + 4 * attention_size * length**2,
        token_seconds=partial(token_seconds, model),
    )


def random_model(auto_class, config, arguments):
    """A model in eval mode whose weights are drawn from a normal distribution."""
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = auto_class.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    # Random weights end a text by chance only: every run is to have all of its tokens, and no more.
    model.generation_config.eos_token_id = model.generation_config.max_length = None
    return model


def num_weights(model, *parts):
    """Parameters of a model whose names contain one of `parts`."""
    return sum(value.numel() for name, value in model.named_parameters() if any(part in name for part in parts))


CONTENDERS = (encoder_decoder, twin)


def random_source(arguments, length):
    """Token ids of shape `(1, length)`, the same for all contenders."""
    generator = torch.Generator().manual_seed(length)
    vocab_size = load_preset(arguments.preset).vocab_size
    return torch.randint(3, vocab_size, (1, length), generator=generator).to(arguments.device)


def measure_memory(build, arguments):
    """Peak bytes of one contender that generates once, and of the process before it was built; run it in a new one."""
    before = peak_bytes(arguments.device)
    build(arguments).token_seconds(random_source(arguments, arguments.source_length), arguments.new_tokens)
    return {"peak_bytes": peak_bytes(arguments.device), "bytes_before_the_model": before}


def measure_times(contenders, arguments):
    """Per repetition: bytes and operations per second of the machine, token times by contender and source length."""
    sources = {length: random_source(arguments, length) for length in arguments.source_lengths}
    buffer = torch.ones(2**27, device=arguments.device)
    matrix = torch.ones(2048, 2048, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    for contender in contenders:
        for source_ids in sources.values():
            contender.token_seconds(source_ids, 4)
    times = {contender.name: {length: [] for length in sources} for contender in contenders}
    bandwidths, matmul_rates = [], []
    for repetition in range(arguments.repetitions):
        bandwidths.append(memory_bandwidth(buffer))
        matmul_rates.append(matmul_rate(matrix))
        for length, source_ids in sources.items():
            for contender in contenders:
                seconds = contender.token_seconds(source_ids, arguments.new_tokens)
                times[contender.name][length].append(seconds)
                progress = f"repetition {repetition + 1} of {arguments.repetitions}, {length} source tokens"
                print(f"{progress}, {contender.name}: {describe(seconds)}", flush=True)
    return bandwidths, matmul_rates, times


def describe(seconds):
    return f"first token {1e3 * seconds[0]:.0f} ms, then {decode_rate(seconds):.1f} tokens/s"


def spread(values):
    """Median and quartiles."""
    lower, median, upper = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def summarize(contender, times, bandwidth, matmul, new_tokens):
    """What one contender did, by source length, beside what the machine could have done."""
    by_length = {}
    for length, runs in times.items():
        first, rate = spread([run[0] for run in runs]), spread([decode_rate(run) for run in runs])
        bytes_read = contender.bytes_per_token(length + new_tokens // 2)
        flops = contender.first_token_flops(length)
        by_length[length] = {
            "first_token_seconds": first,
            "decode_tokens_per_second": rate,
            "bytes_read_per_token": bytes_read,
            "share_of_memory_bandwidth": bytes_read * rate["median"] / bandwidth,
            "first_token_flops": flops,
            "share_of_matmul_rate": flops / first["median"] / matmul,
            "token_seconds": runs,
        }
    return {"name": contender.name, "num_parameters": contender.num_parameters, "by_source_length": by_length}


def ratios(ours, other):
    """Our first token and decode rate by the other's, run by run: neighbours in time share the machine's mood."""
    pairs = list(zip(ours, other, strict=True))
    return {
        "first_token": spread([run[0] / opponent[0] for run, opponent in pairs]),
        "decode_rate": spread([decode_rate(run) / decode_rate(opponent) for run, opponent in pairs]),
    }


def run(arguments):
    """The contents of `benchmark.json`."""
    memory = [in_new_process(measure_memory, build, arguments) for build in CONTENDERS]
    contenders = [build(arguments) for build in CONTENDERS]
    bandwidths, matmul_rates, times = measure_times(contenders, arguments)
    bandwidth, matmul = spread(bandwidths), spread(matmul_rates)
    rows = [
        summarize(one, times[one.name], bandwidth["median"], matmul["median"], arguments.new_tokens) | peak
        for one, peak in zip(contenders, memory, strict=True)
    ]
    ours, other = (times[contender.name] for contender in contenders[:2])
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "machine": machine(arguments.device),
        "memory_bandwidth_bytes_per_second": bandwidth,
        "matmul_flops_per_second": matmul,
        "contenders": rows,
        "first_by_second_contender": {length: ratios(ours[length], other[length]) for length in ours},
    }


COLUMNS = (
    *("model", "parameters", "first token", "decode rate", "peak memory", "bytes read per token"),
    *("share of memory bandwidth", "FLOPs to first token", "share of matmul rate"),
)


def table(report):
    """The contenders at `--source-length`, as Markdown."""
    rows = [_row(contender, report["arguments"]["source_length"]) for contender in report["contenders"]]
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(contender, source_length):
    result = contender["by_source_length"][source_length]
    return (
        contender["name"],
        f"{contender['num_parameters'] / 1e6:,.1f}M",
        f"{_text(result['first_token_seconds'], 1e3, '.0f')} ms",
        f"{_text(result['decode_tokens_per_second'], 1, '.1f')} tokens/s",
        f"{contender['peak_bytes'] / 1e6:,.0f} MB",
        f"{result['bytes_read_per_token'] / 1e6:,.1f} MB",
        f"{result['share_of_memory_bandwidth']:.0%}",
        f"{result['first_token_flops'] / 1e9:,.1f} G",
        f"{result['share_of_matmul_rate']:.0%}",
    )


def _text(summary, factor, form):
    median, lower, upper = (
        format(summary[key] * factor, form) for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} ({lower} to {upper})"


def notes(report):
    """What the table's numbers are, and how the two models compare at every source length."""
    lines = [
        f"{setting(report)}, {report['arguments']['source_length']} source tokens: median (quartiles) of "
        f"{report['arguments']['repetitions']} repetitions.",
        f"Memory bandwidth, reading 512 MiB: {_text(report['memory_bandwidth_bytes_per_second'], 1e-9, '.1f')} GB/s; "
        f"2048 x 2048 matrix product: {_text(report['matmul_flops_per_second'], 1e-9, '.0f')} GFLOP/s.",
        "Peak memory: of a process that builds this model and generates once; "
        f"{report['contenders'][0]['bytes_before_the_model'] / 1e6:.0f} MB of it were there before the model.",
    ]
    for length, ratio in report["first_by_second_contender"].items():
        first, rate = _text(ratio["first_token"], 1, ".2f"), _text(ratio["decode_rate"], 1, ".2f")
        lines.append(f"By the twin, {length} source tokens: first token {first} x, decode rate {rate} x.")
    return "\n".join(lines)


def setting(report):
    arguments, machine = report["arguments"], report["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, torch threads: {machine['torch_threads']}"
    return f"{arguments['preset']} on {where}, {arguments['dtype']}, {arguments['new_tokens']} new tokens"


def plot(report, path):
    """Writes first token and decode rate over source length as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    lengths = report["arguments"]["source_lengths"]
    panels = (("first_token_seconds", 1e3, "first token (ms)"), ("decode_tokens_per_second", 1, "decode (tokens/s)"))
    for axis, (key, factor, label) in zip(axes, panels, strict=True):
        for contender, marker in zip(report["contenders"], "osD^v", strict=False):
            _plot_line(axis, contender, key, factor, marker)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, lengths)
        axis.set(xlabel="source length (tokens)", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{setting(report)}: median and quartiles", fontsize=11)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def _plot_line(axis, contender, key, factor, marker):
    by_length = contender["by_source_length"]
    summaries = [by_length[length][key] for length in by_length]
    middle, low, high = (
        factor * np.array([summary[name] for summary in summaries])
        for name in ("median", "lower_quartile", "upper_quartile")
    )
    axis.errorbar(
        list(by_length),
        middle,
        (middle - low, high - middle),
        marker=marker,
        elinewidth=1,
        capsize=3,
        label=contender["name"],
    )


def write(path, function):
    """Has `function` write to a temporary name first, so that an interrupted run leaves no half file."""
    temporary = path.with_name(f"{path.name}.part")
    function(temporary)
    os.replace(temporary, path)
    print(f"Wrote {path}")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="330m", choices=list_presets())
    parser.add_argument("--source-length", type=int, default=512, help="tokens; the length of the table")
    parser.add_argument(
        "--source-lengths", type=_lengths, help="tokens, such as 128,256,512; the plot (default: down to 1/8)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="generated per run, at least 2")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder of the JSON and PNG")
    parsed = parser.parse_args(arguments)
    if parsed.source_length < 8 or parsed.new_tokens < 2 or parsed.repetitions < 1:
        parser.error("a run needs at least 8 source tokens, 2 new tokens and 1 repetition")
    lengths = parsed.source_lengths or [parsed.source_length // divisor for divisor in (8, 4, 2)]
    parsed.source_lengths = sorted({*lengths, parsed.source_length})
    return parsed


def _lengths(text):
    return [int(length) for length in text.split(",")]


def main():
    arguments = parse_arguments()
    report = run(arguments)
    print(f"\n{table(report)}\n\n{notes(report)}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": " ".join(sys.argv), **report}, indent=2)
    write(arguments.output / "benchmark.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write(arguments.output / "benchmark.png", lambda path: plot(report, path))


if __name__ == "__main__":
    main()
