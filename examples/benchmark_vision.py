# SPDX-License-Identifier: Apache-2.0
"""Time a vision-text preset beside its decoder-only baseline: LLaVA-NeXT with the same tower, tiles and parameters.

    python examples/benchmark_vision.py --preset 800m-vlm --images 1 4

Random weights, batch 1, greedy `generate`, both with a cache; images of 640 x 480 pixels, 2,340 tokens each. First
token: seconds from tiles and ids to the first generated id; decode rate: the other tokens per second. Each model has a
process of its own; they take turns, and memory bandwidth is measured in between. Medians are reported. Writes
`benchmark_vision.json` and `benchmark_vision.png`: milliseconds per token over image tokens, beside what weights, keys
and values cost at the measured bandwidth. Not measured: cutting images into tiles, batches, beams.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from encdec_slm.benchmarks.machine import Worker, describe_machine, has_bfloat16_units, memory_bandwidth
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin, list_presets, load_preset
from encdec_slm.configuration.sizes import build_model, num_cached_values, num_parameters, num_weights_per_token
from encdec_slm.configuration_encdec_vlm import grid_shape, num_image_tokens
from encdec_slm.generation_speed import decode_rate, token_seconds


OURS, BASELINE = "encoder-decoder", "LLaVA-NeXT"
HEIGHT, WIDTH = 480, 640
NUM_TEXT_TOKENS = 29  # of the default prompt with a short question
NUM_BUFFER_VALUES = 2**27


def main():
    arguments = parse_arguments()
    report = {"arguments": {**vars(arguments), "output": str(arguments.output)}}
    report |= {"machine": describe_machine(arguments.device), **measure(arguments)}
    print(f"\n{format_table(report)}\n\n{format_notes(report)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output / "benchmark_vision.json", json.dumps(report, indent=2) + "\n")
    figure = draw_costs(report)
    write_file(arguments.output / "benchmark_vision.png", lambda path: figure.savefig(path, format="png", dpi=120))
    print(f"Wrote benchmark_vision.json and benchmark_vision.png to {arguments.output}.")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name in list_presets() if name.endswith("-vlm")]
    parser.add_argument("--preset", default="800m-vlm", choices=presets)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="images per source")
    parser.add_argument("--new_tokens", type=int, default=32, help="generated per run, at least 2")
    parser.add_argument("--repetitions", type=int, default=3)
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16; float32 on CPUs without it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_vision"))
    arguments = parser.parse_args()
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if arguments.device != "cpu" or has_bfloat16_units() else "float32"
    if arguments.new_tokens < 2 or arguments.repetitions < 1 or min(arguments.images) < 0:
        parser.error("a run needs at least 2 new tokens, 1 repetition and no negative number of images")
    return arguments


def load_config(name, preset):
    config = load_preset(preset)
    return config if name == OURS else decoder_only_twin(config)


def build_inputs(name, num_images, arguments):
    """Build ids with as many image tokens as there are features, and random tiles in the form of the model."""
    config = load_preset(arguments.preset)
    tile, size = config.tile_size, (HEIGHT, WIDTH)
    # LLaVA-NeXT does not limit the grid; images of this size have as many tokens in both models.
    max_num_tiles = config.max_num_tiles if name == OURS else sys.maxsize
    geometry = (config.image_grid_pinpoints, tile, config.patches_per_side, max_num_tiles)
    rows, columns = grid_shape(size, config.image_grid_pinpoints, tile)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (NUM_TEXT_TOKENS,), generator=generator)
    images = torch.full((num_images * num_image_tokens(size, *geometry),), config.image_token_id)
    inputs = {"source_ids": torch.cat((text, images))[None]}
    if num_images:
        tiles = torch.randn(num_images, 1 + rows * columns, 3, tile, tile, generator=generator)
        tiles = tiles.to(getattr(torch, arguments.dtype))
        inputs["pixel_values"] = tiles.flatten(0, 1) if name == OURS else tiles
        inputs["image_sizes"] = torch.tensor([size] * num_images)
    return {key: tensor.to(arguments.device) for key, tensor in inputs.items()}


def load(name, arguments):
    """Return the function that times one of the models for a number of images and of new tokens."""
    torch.manual_seed(0)
    config = load_config(name, arguments.preset)
    model = build_model(config, arguments.device, dtype=getattr(torch, arguments.dtype)).eval()
    # Random weights end a text only by chance.
    model.generation_config.eos_token_id = model.generation_config.max_length = None
    inputs = {count: build_inputs(name, count, arguments) for count in arguments.images}
    return lambda count, num_new_tokens: token_seconds(model, **inputs[count], num_new_tokens=num_new_tokens)


def measure(arguments):
    """Measure token times and peaks of memory by model and number of images, and the bandwidth in between."""
    workers = {name: Worker(name, partial(load, name, arguments), arguments.device) for name in (OURS, BASELINE)}
    runs = {name: {count: [] for count in arguments.images} for name in workers}
    peaks, bandwidths = {name: {} for name in workers}, []
    for worker in workers.values():
        worker.token_seconds(arguments.images[0], 2)
    for _ in range(arguments.repetitions):
        bandwidths.append(memory_bandwidth(torch.ones(NUM_BUFFER_VALUES, device=arguments.device)))
        for count in arguments.images:
            for name, worker in workers.items():
                seconds = worker.token_seconds(count, arguments.new_tokens)
                runs[name][count].append(seconds)
                peaks[name].setdefault(count, worker.peak_bytes())
                rate = f"first token {seconds[0]:.2f} s, {decode_rate(seconds):.2f} tokens/s"
                print(f"{name}, {count} images: {rate}", flush=True)
    for worker in workers.values():
        worker.close()
    lengths = {count: build_inputs(OURS, count, arguments)["source_ids"].shape[1] for count in arguments.images}
    return {
        "source_tokens": lengths,
        "bandwidth": median(bandwidths),
        "num_parameters": {name: num_parameters(load_config(name, arguments.preset)) for name in workers},
        "bytes_per_token": {name: count_bytes(name, lengths, arguments) for name in workers},
        "peak_bytes": peaks,
        "token_seconds": runs,
    }


def count_bytes(name, lengths, arguments):
    """Return the bytes that a generated token reads, by number of images: weights, keys and values of the source."""
    config, item_bytes = load_config(name, arguments.preset), getattr(torch, arguments.dtype).itemsize
    weights, cached = num_weights_per_token(config), num_cached_values(config)
    return {count: item_bytes * (weights + length * cached) for count, length in lengths.items()}


def median_first_token(report, name, count):
    return median(seconds[0] for seconds in report["token_seconds"][name][count])


def median_rate(report, name, count):
    return median(decode_rate(seconds) for seconds in report["token_seconds"][name][count])


def format_table(report):
    header = ("model", "parameters", "images", "source tokens", "first token", "decode rate", "MB read per token")
    lines = [header, ("---", *["---:"] * (len(header) - 1))]
    for count, length in report["source_tokens"].items():
        for name in (OURS, BASELINE):
            numbers = (f"{report['num_parameters'][name] / 1e6:,.1f}M", str(count), f"{length:,}")
            first, rate = median_first_token(report, name, count), median_rate(report, name, count)
            read = f"{report['bytes_per_token'][name][count] / 1e6:,.0f}"
            lines.append((name, *numbers, f"{first:.2f} s", f"{rate:.2f} tokens/s", read))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_notes(report):
    lines = []
    for count in report["source_tokens"]:
        pairs = list(zip(*(report["token_seconds"][name][count] for name in (OURS, BASELINE)), strict=True))
        first = median(ours[0] / other[0] for ours, other in pairs)
        decode = median(decode_rate(ours) / decode_rate(other) for ours, other in pairs)
        peaks = ", ".join(f"{name} {value[count] / 1e6:,.0f} MB" for name, value in report["peak_bytes"].items())
        lines.append(f"{count} images: first token {first:.2f} x the baseline's, decode rate {decode:.2f} x.")
        lines.append(f"Peak memory with up to {count} images, each in its own process: {peaks}.")
    lines.append(
        f"{report['arguments']['preset']}, {report['arguments']['dtype']}, {report['machine']['cpu']}, "
        f"{report['machine']['torch_threads']} threads, memory bandwidth {report['bandwidth'] / 1e9:.1f} GB/s."
    )
    return "\n".join(lines)


def draw_costs(report):
    """Draw milliseconds per generated token over source tokens, and the cost of reading at the measured bandwidth."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    lengths = list(report["source_tokens"].values())
    for name in (OURS, BASELINE):
        costs = [1e3 / median_rate(report, name, count) for count in report["source_tokens"]]
        (line,) = axes.plot(lengths, costs, marker="o", label=name)
        read = [1e3 * value / report["bandwidth"] for value in report["bytes_per_token"][name].values()]
        axes.plot(lengths, read, linestyle="--", color=line.get_color(), label=f"{name}: reading alone")
    axes.set(xlabel="source tokens (images of 2,340 each)", ylabel="milliseconds per generated token")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
