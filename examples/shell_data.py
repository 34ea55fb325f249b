# SPDX-License-Identifier: Apache-2.0
"""Write the training rows of the shell model, and an untrained model with a tokenizer trimmed to them.

    python examples/shell_data.py OUT --nl2bash NL2BASH/train.jsonl --held-out NL2BASH/test.jsonl ... \\
        --tldr TLDR --fig FIG --tokenizer Qwen/Qwen2.5-Coder-0.5B-Instruct

`docs/shell.md` says where the sources are. Writes OUT/train.jsonl, the rows of NL2Bash among them in
OUT/nl2bash.jsonl, and the folder OUT/student. No training request is near a held-out one.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer, set_seed

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.checkpoints import write_file
from encdec_slm.trainers.new_models import preset_config
from encdec_slm.trainers.tasks.shell import build_training_rows
from encdec_slm.trainers.tasks.shell_sources import read_fig, read_nl2bash, read_tldr
from encdec_slm.vocabulary import trim_tokenizer


def main():
    arguments = parse_arguments()
    held_out = [row for path in arguments.held_out for row in read_nl2bash(path)]
    rows = build_training_rows(
        read_nl2bash(arguments.nl2bash),
        read_tldr(arguments.tldr),
        read_fig(arguments.fig),
        held_out,
        arguments.copies,
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.output_dir / "train.jsonl", rows)
    write_rows(arguments.output_dir / "nl2bash.jsonl", [row for row in rows if row.origin == "nl2bash"])
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    texts = (text for row in rows for text in (row.source, row.target))
    tokenizer, _ = trim_tokenizer(tokenizer, texts, max_size=arguments.vocabulary_size)
    set_seed(arguments.seed)
    model = EncDecSLMForConditionalGeneration(preset_config(arguments.preset, tokenizer))
    model.save_pretrained(arguments.output_dir / "student")
    tokenizer.save_pretrained(arguments.output_dir / "student")
    counts = ", ".join(f"{count} of {origin}" for origin, count in Counter(row.origin for row in rows).items())
    print(f"{len(rows)} rows ({counts}); {model.num_parameters():,} parameters, {len(tokenizer)} tokens.")


def write_rows(path, rows):
    lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows)
    write_file(path, "\n".join(lines) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--nl2bash", required=True, help="training rows of NL2Bash")
    parser.add_argument("--held-out", nargs="+", required=True, help="validation and test rows of NL2Bash")
    parser.add_argument("--tldr", required=True, help="clone or archive of tldr-pages")
    parser.add_argument("--fig", required=True, help="folder of the npm package @withfig/autocomplete")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name of the tokenizer to trim")
    parser.add_argument("--copies", type=int, default=9, help="of each NL2Bash row, with other literals")
    parser.add_argument("--preset", default="10m")
    parser.add_argument("--vocabulary-size", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
