# SPDX-License-Identifier: Apache-2.0
"""Time pre-training batches of models of 223M parameters beside T5-v1.1-base in transformers: random weights and ids.

    python examples/benchmark_pretraining.py

nanoT5's rows (github.com/PiotrNawrot/nanoT5): 512 source and 114 target tokens, without padding. Contenders are
T5-v1.1-base (248M parameters with untied embeddings; transformers ties them), this family in the same shape, and in
its own shape of the same size, with 2/3 of the layers in the encoder. They take turns in one loop: the loss under
autocast, and its gradients. Prints, and writes to `benchmark_pretraining.json`, tokens per second (source and target;
median and quartiles), the speed relative to T5, and the share of the rate at which this device multiplies large
matrices, from two operations per weight and token in the forward pass and four in the backward pass; attention between
tokens is not counted. On a CPU, seconds are those of one core (OMP_NUM_THREADS=1). Not measured: the optimizer, which
is the same for all, data loading, several devices.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.benchmarks.machine import describe_machine
from encdec_slm.benchmarks.measuring import spread
from encdec_slm.checkpoints import write_file
from encdec_slm.run_results import format_table


T5 = {
    **{"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12},
    **{"num_heads": 12, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0},
}
SHAPE = {
    **{"vocab_size": 32128, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "head_dim": 64},
    **{"num_key_value_heads": 12, "hidden_act": "silu", "gated_mlp": True, "max_position_embeddings": 1024},
}
SAME_SHAPE = {"encoder_num_hidden_layers": 12, "decoder_num_hidden_layers": 12}
OWN_SHAPE = {"encoder_num_hidden_layers": 16, "decoder_num_hidden_layers": 9}
CONTENDERS = {
    "T5-v1.1-base, transformers": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "ours, 12 + 12 layers": lambda: EncDecSLMForConditionalGeneration(EncDecSLMConfig(**SHAPE, **SAME_SHAPE)),
    "ours, 16 + 9 layers": lambda: EncDecSLMForConditionalGeneration(EncDecSLMConfig(**SHAPE, **OWN_SHAPE)),
}
# Linear layers of decoders that read the encoder's output, in both implementations.
READS_SOURCE = ("cross_attn.k_proj", "cross_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v")


def count_operations(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Return the operations of matrices in a loss and its gradients."""
    source_tokens, target_tokens = batch["input_ids"].numel(), batch["labels"].numel()
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Keys and values of cross-attention are those of source tokens.
            reads_source = "encoder." in name or name.endswith(READS_SOURCE)
            total += 6 * module.weight.numel() * (source_tokens if reads_source else target_tokens)
    return total


def choose_clock(device: str) -> Callable[[], float]:
    """Return the clock: on a CPU that of this process, which others do not distort."""
    return time.process_time if device == "cpu" else time.perf_counter


def time_batch(model: torch.nn.Module, batch: dict[str, torch.Tensor], arguments: argparse.Namespace) -> float:
    """Return the seconds of a loss and its gradients."""
    clock = choose_clock(arguments.device)
    started = clock()
    with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def measure_matrix_rate(arguments: argparse.Namespace, size: int = 2048) -> float:
    """Return operations per second of a product of square matrices, the best of five."""
    left, right = torch.randn(2, size, size, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    clock, seconds = choose_clock(arguments.device), []
    for _ in range(5):
        started = clock()
        left @ right
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return 2 * size**3 / min(seconds)


def run(arguments: argparse.Namespace) -> dict:
    """Return the contents of `benchmark_pretraining.json`."""
    torch.manual_seed(0)
    shapes = {"input_ids": arguments.source_length, "labels": arguments.target_length}
    batch = {
        name: torch.randint(3, 32000, (arguments.batch_size, length), device=arguments.device)
        for name, length in shapes.items()
    }
    num_tokens = sum(ids.numel() for ids in batch.values())
    rates, seconds, rows = [measure_matrix_rate(arguments)], {name: [] for name in CONTENDERS}, {}
    for _ in range(arguments.rounds):
        for name, build in CONTENDERS.items():  # one after the other, so that one model is in memory
            model = build().to(arguments.device).train()
            rows[name] = {"num_parameters": model.num_parameters(), "operations": count_operations(model, batch)}
            timed = torch.compile(model) if arguments.compile else model
            # The first batch warms up.
            seconds[name] += [time_batch(timed, batch, arguments) for _ in range(arguments.repetitions + 1)][1:]
            del model, timed
            rates.append(measure_matrix_rate(arguments))
    for name, row in rows.items():
        row["tokens_per_second"] = spread(num_tokens / torch.tensor(seconds[name]).numpy())
        row["matrix_share"] = row["operations"] * row["tokens_per_second"]["median"] / num_tokens / max(rates)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    machine = describe_machine(arguments["device"])
    return {"arguments": arguments, "machine": machine, "matrix_rates": rates, "rows": rows, "seconds": seconds}


def build_table(report: dict) -> list[list[str]]:
    table = [["model", "parameters", "tokens/s (quartiles)", "relative to T5", "share of matrix rate"]]
    baseline = next(iter(report["rows"].values()))["tokens_per_second"]["median"]
    for name, row in report["rows"].items():
        speed = row["tokens_per_second"]
        cell = "{median:,.0f} ({lower_quartile:,.0f} to {upper_quartile:,.0f})".format(**speed)
        share = f"{row['matrix_share']:.0%}"
        table.append([name, f"{row['num_parameters']:,}", cell, f"{speed['median'] / baseline:.2f}", share])
    return table


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1, help="rows")
    parser.add_argument("--source-length", type=int, default=512)
    parser.add_argument("--target-length", type=int, default=114)
    parser.add_argument("--repetitions", type=int, default=3, help="batches of a contender in a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of autocast")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, which takes minutes on a CPU")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_pretraining"), help="folder")
    return parser.parse_args(arguments)


def main(arguments=None):
    arguments = parse_arguments(arguments)
    report = run(arguments)
    print(f"\n{max(report['matrix_rates']) / 1e9:,.0f} billion operations per second in {arguments.dtype} matrices\n")
    print(format_table(build_table(report), markdown=True))
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": " ".join(sys.argv), **report}, indent=2) + "\n"
    write_file(arguments.output / "benchmark_pretraining.json", text)


if __name__ == "__main__":
    main()
