# SPDX-License-Identifier: Apache-2.0
"""Time training on packed, padded and length-grouped batches of the same rows: random weights, float32, no optimizer.

    python examples/benchmark_packing.py                          # long sources: functions and their docstrings
    python examples/benchmark_packing.py --train-file rows.jsonl  # your rows of source and target

Padded batches have rows in random order; length-grouped ones are those of `train_sampling_strategy: group_by_length`;
packed ones are random batches whose rows [`~encdec_slm.trainers.packing.DataCollatorWithPacking`] packs. Contenders
take turns; a turn is the loss and its gradients for all batches. Prints, and writes to `benchmark_packing.json`, the
tokens per second (source and target, without padding; median and quartiles) and the share of padding. On a CPU these
are seconds of one processor core, which other processes do not distort. Loading data, making batches and the optimizer
are not measured, since they are the same or take little time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from encdec_slm.benchmarks.machine import describe_machine
from encdec_slm.benchmarks.measuring import spread
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import list_presets
from encdec_slm.trainers.new_models import build_text_model
from encdec_slm.trainers.packing import DataCollatorWithPacking
from encdec_slm.trainers.row_encoding import RowEncoder, encode_rows
from encdec_slm.trainers.seq2seq_data import DataArguments, load_splits


PAD_TOKEN_ID = 0  # of the tokenizers that we train


def build(arguments):
    """Return the model, and the batches of each contender."""
    train = load_splits(DataArguments(train_file=arguments.train_file))["train"]
    num_rows = arguments.batch_size * arguments.num_batches
    if len(train) < num_rows:
        sys.exit(f"{num_rows} rows are required, but there are {len(train)}. Lower `--batch-size` or `--num-batches`.")
    torch.manual_seed(0)
    model, tokenizer = build_text_model(arguments.preset, train, arguments.vocab_size, arguments.source_length)
    encoder = RowEncoder(tokenizer, arguments.source_length, arguments.target_length)
    # More rows than are used, since rows are grouped by length among 50 batches.
    rows = encode_rows(
        train.shuffle(seed=0).select(range(min(len(train), 50 * arguments.batch_size))), encoder, "rows"
    )
    lengths = [len(ids) for ids in rows["input_ids"]]
    grouped = get_length_grouped_indices(lengths, arguments.batch_size, generator=torch.Generator().manual_seed(0))
    # Whole batches that are spread over the lengths.
    starts = torch.linspace(0, len(rows) // arguments.batch_size - 1, arguments.num_batches).long().tolist()
    grouped = [grouped[start * arguments.batch_size :][: arguments.batch_size] for start in starts]
    chosen = rows.select([row for batch in grouped for row in batch])
    shuffled = chosen.shuffle(seed=0)
    pack = DataCollatorWithPacking(tokenizer, model.config.decoder_start_token_id)
    contenders = {
        "padded": (shuffled, encoder.collate),
        "length-grouped": (chosen, encoder.collate),
        "packed": (shuffled, pack),
    }
    batches = {
        name: [
            {key: value.to(arguments.device) for key, value in collate(dataset.select(part).to_list()).items()}
            for part in torch.arange(num_rows).split(arguments.batch_size)
        ]
        for name, (dataset, collate) in contenders.items()
    }
    return model.to(arguments.device).train(), batches


def time_batches(model, batches):
    """Return the seconds of the losses and gradients of all batches, on a CPU those of all threads of this process."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    start = clock()
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def count_tokens(batches):
    """Return the numbers of tokens and of positions of batches, padding included."""
    num_tokens = num_positions = 0
    for batch in batches:
        num_positions += batch["input_ids"].numel() + batch["labels"].numel()
        num_tokens += int((batch["labels"] != -100).sum() + (batch["input_ids"] != PAD_TOKEN_ID).sum())
    return num_tokens, num_positions


def run(arguments):
    """Return the contents of `benchmark_packing.json`."""
    model, batches = build(arguments)
    counts = {name: count_tokens(parts) for name, parts in batches.items()}
    seconds = {name: [] for name in batches}
    for repetition in range(arguments.repetitions + 1):
        for name, parts in batches.items():
            elapsed = time_batches(model, parts)
            if repetition:  # the first turn warms up
                seconds[name].append(elapsed)
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "machine": describe_machine(arguments.device),
        "num_parameters": model.num_parameters(),
        "tokens_per_row": counts["padded"][0] / (arguments.batch_size * arguments.num_batches),
        "tokens_per_second": {
            name: spread(counts[name][0] / torch.tensor(values).numpy()) for name, values in seconds.items()
        },
        "padding_share": {name: 1 - tokens / positions for name, (tokens, positions) in counts.items()},
        "seconds": seconds,
    }


def format_table(report):
    lines = ["| batches | tokens/s (quartiles) | padding |", "| --- | ---: | ---: |"]
    for name, speed in report["tokens_per_second"].items():
        speed = "{median:,.0f} ({lower_quartile:,.0f} to {upper_quartile:,.0f})".format(**speed)
        lines.append(f"| {name} | {speed} | {report['padding_share'][name]:.1%} |")
    return "\n".join(lines)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", help="rows of source and target; the docstring task without it")
    parser.add_argument("--preset", default="1m", choices=list_presets())
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer, which is trained on the rows")
    parser.add_argument("--batch-size", type=int, default=32, help="rows")
    parser.add_argument("--num-batches", type=int, default=8)
    parser.add_argument("--source-length", type=int, default=256, help="longest source, in tokens")
    parser.add_argument("--target-length", type=int, default=96, help="longest target, in tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_packing"), help="folder of the report")
    return parser.parse_args(arguments)


def main():
    arguments = parse_arguments()
    report = run(arguments)
    print(f"\n{report['tokens_per_row']:.0f} tokens per row, {report['num_parameters']:,} parameters\n")
    print(format_table(report))
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": " ".join(sys.argv), **report}, indent=2) + "\n"
    write_file(arguments.output / "benchmark_packing.json", text)


if __name__ == "__main__":
    main()
