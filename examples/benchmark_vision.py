# SPDX-License-Identifier: Apache-2.0
"""Times a vision-text preset against its decoder-only twin, LLaVA-NeXT with the same tower, tiles and parameters.

    python examples/benchmark_vision.py --preset 800m-vlm --images 1 4

Random weights, batch 1, greedy `generate`, both with a cache; images of 640 x 480 pixels, 2,340 tokens each. First
token: seconds from tiles and ids to the first generated id; decode rate: the other tokens by the seconds that they
take. Each model has a process of its own; they take turns, with memory bandwidth measured in between. Medians are
reported. Writes `benchmark_vision.json` and `benchmark_vision.png`: milliseconds per token over
image tokens, beside what weights, keys and values cost at the measured bandwidth. Not measured: cutting images into
tiles, batches, beams.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText

from encdec_slm.benchmarks.contenders import has_bfloat16_units
from encdec_slm.benchmarks.machine import machine, memory_bandwidth
from encdec_slm.benchmarks.workers import Worker
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin, list_presets, load_preset
from encdec_slm.configuration.sizes import num_cached_values, num_parameters, num_weights_per_token
from encdec_slm.configuration_encdec_vlm import grid_shape, num_image_tokens
from encdec_slm.generation_speed import decode_rate, token_seconds


OURS, TWIN = "encoder-decoder", "LLaVA-NeXT twin"
HEIGHT, WIDTH = 480, 640
NUM_TEXT_TOKENS = 29  # of the predecessor's prompt with a short question
BANDWIDTH_VALUES = 2**27


def main():
    arguments = parse_arguments()
    report = {"arguments": {**vars(arguments), "output": str(arguments.output)}, "machine": machine(arguments.device)}
    report |= measure(arguments)
    print(f"\n{table(report)}\n\n{notes(report)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2) + "\n"
    write_file(arguments.output / "benchmark_vision.json", lambda path: path.write_text(text, encoding="utf-8"))
    figure = cost_figure(report)
    write_file(arguments.output / "benchmark_vision.png", lambda path: figure.savefig(path, format="png", dpi=120))
    print(f"Wrote benchmark_vision.json and benchmark_vision.png to {arguments.output}.")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name in list_presets() if name.endswith("-vlm")]
    parser.add_argument("--preset", default="800m-vlm", choices=presets)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="images per source, one row each")
    parser.add_argument("--new_tokens", type=int, default=32, help="generated per run, at least 2")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16; float32 on CPUs without it",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_vision"))
    arguments = parser.parse_args()
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if arguments.device != "cpu" or has_bfloat16_units() else "float32"
    if arguments.new_tokens < 2 or arguments.repetitions < 1 or min(arguments.images) < 0:
        parser.error("a run needs at least 2 new tokens, 1 repetition and no negative number of images")
    return arguments


def build(name, arguments):
    """One of the two models, with random weights, in eval mode."""
    config = load_preset(arguments.preset)
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForImageTextToText.from_config(
            config if name == OURS else decoder_only_twin(config), dtype=getattr(torch, arguments.dtype)
        ).eval()
    # Random weights end a text by chance only: every run is to have all of its tokens, and no more.
    model.generation_config.eos_token_id = model.generation_config.max_length = None
    return model


def inputs(name, num_images, arguments):
    """Ids with as many image tokens as there are features, and random tiles in the form that the model takes."""
    config = load_preset(arguments.preset)
    tile, size = config.tile_size, (HEIGHT, WIDTH)
    # LLaVA-NeXT shrinks no grid; an image of this size has as many tokens in both all the same.
    max_num_tiles = config.max_num_tiles if name == OURS else sys.maxsize
    geometry = (config.image_grid_pinpoints, tile, config.patches_per_side, max_num_tiles)
    rows, columns = grid_shape(size, config.image_grid_pinpoints, tile)
    num_tiles = 1 + rows * columns
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (NUM_TEXT_TOKENS,), generator=generator)
    images = torch.full((num_images * num_image_tokens(size, *geometry),), config.image_token_id)
    given = {"source_ids": torch.cat((text, images))[None]}
    if num_images:
        tiles = torch.randn(num_images, num_tiles, 3, tile, tile, generator=generator)
        tiles = tiles.to(getattr(torch, arguments.dtype))
        given["pixel_values"] = tiles.flatten(0, 1) if name == OURS else tiles
        given["image_sizes"] = torch.tensor([size] * num_images)
    return {key: tensor.to(arguments.device) for key, tensor in given.items()}


# Measuring


def load(name, arguments):
    """What times one of the two models, for a number of images and of new tokens."""
    model = build(name, arguments)
    given = {count: inputs(name, count, arguments) for count in arguments.images}
    return lambda count, num_new_tokens: token_seconds(model, **given[count], num_new_tokens=num_new_tokens)


def measure(arguments):
    """Token times and peaks of memory by model and number of images, and the machine's bandwidth in between."""
    workers = {name: Worker(name, partial(load, name, arguments), arguments.device) for name in (OURS, TWIN)}
    runs = {name: {count: [] for count in arguments.images} for name in workers}
    peaks = {name: {} for name in workers}
    buffer, bandwidths = torch.ones(BANDWIDTH_VALUES, device=arguments.device), []
    for worker in workers.values():
        worker.token_seconds(arguments.images[0], 2)
    for _ in range(arguments.repetitions):
        bandwidths.append(memory_bandwidth(buffer))
        for count in arguments.images:
            for name, worker in workers.items():
                seconds = worker.token_seconds(count, arguments.new_tokens)
                runs[name][count].append(seconds)
                peaks[name].setdefault(count, worker.peak_bytes())
                print(
                    f"{name}, {count} images: first token {seconds[0]:.2f} s, {decode_rate(seconds):.2f} tokens/s",
                    flush=True,
                )
    for worker in workers.values():
        worker.close()
    counts = {count: inputs(OURS, count, arguments)["source_ids"].shape[1] for count in arguments.images}
    configs = {OURS: load_preset(arguments.preset), TWIN: decoder_only_twin(load_preset(arguments.preset))}
    itemsize = getattr(torch, arguments.dtype).itemsize
    return {
        "source_tokens": counts,
        "bandwidth": median(bandwidths),
        "num_parameters": {name: num_parameters(config) for name, config in configs.items()},
        "bytes_per_token": {
            name: {count: itemsize * values_per_token(config, length) for count, length in counts.items()}
            for name, config in configs.items()
        },
        "peak_bytes": peaks,
        "token_seconds": runs,
    }


def values_per_token(config, source_length):
    """Numbers that one generated token reads: weights, and keys and values of the source."""
    return num_weights_per_token(config) + source_length * num_cached_values(config)


# Telling


def first_token(report, name, count):
    return median(run[0] for run in report["token_seconds"][name][count])


def rate(report, name, count):
    return median(decode_rate(run) for run in report["token_seconds"][name][count])


def table(report):
    """Both models at each number of images, as Markdown."""
    header = ("model", "parameters", "images", "source tokens", "first token", "decode rate", "MB read per token")
    lines = [header, ("---", *["---:"] * (len(header) - 1))]
    for count, length in report["source_tokens"].items():
        for name in (OURS, TWIN):
            numbers = (f"{report['num_parameters'][name] / 1e6:,.1f}M", str(count), f"{length:,}")
            times = (f"{first_token(report, name, count):.2f} s", f"{rate(report, name, count):.2f} tokens/s")
            lines.append((name, *numbers, *times, f"{report['bytes_per_token'][name][count] / 1e6:,.0f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(report):
    """How the two compare, run by run, and what else was measured."""
    lines = []
    for count in report["source_tokens"]:
        pairs = list(zip(*(report["token_seconds"][name][count] for name in (OURS, TWIN)), strict=True))
        first = median(ours[0] / other[0] for ours, other in pairs)
        decode = median(decode_rate(ours) / decode_rate(other) for ours, other in pairs)
        lines.append(f"{count} images: first token {first:.2f} x the twin's, decode rate {decode:.2f} x.")
    for count in report["source_tokens"]:
        peaks = ", ".join(f"{name} {value[count] / 1e6:,.0f} MB" for name, value in report["peak_bytes"].items())
        lines.append(f"Peak memory with up to {count} images, each in its own process: {peaks}.")
    lines.append(
        f"{report['arguments']['preset']}, {report['arguments']['dtype']}, {report['machine']['cpu']}, "
        f"{report['machine']['torch_threads']} threads, memory bandwidth {report['bandwidth'] / 1e9:.1f} GB/s."
    )
    return "\n".join(lines)


def cost_figure(report):
    """Milliseconds per generated token over source tokens, and what reading costs at the measured bandwidth."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    lengths = list(report["source_tokens"].values())
    for name in (OURS, TWIN):
        costs = [1e3 / rate(report, name, count) for count in report["source_tokens"]]
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
