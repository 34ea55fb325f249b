# SPDX-License-Identifier: Apache-2.0
"""Write the training rows of the shell model, an untrained model, and its decoder-only baseline.

    python examples/shell_data.py OUT --nl2bash NL2BASH/train.jsonl --held-out NL2BASH/test.jsonl ... \\
        --tldr TLDR --teacher Qwen/Qwen2.5-Coder-0.5B-Instruct

`docs/shell.md` says where the sources are. Writes OUT/train.jsonl and the folders OUT/student and OUT/baseline, whose
tokenizer is that of the teacher, trimmed to the rows, and whose token embeddings are the principal components of the
teacher's: words that mean the same are near each other from the start. No training request is near a held-out one.
OUT/teacher.jsonl has the rows of examples/shell_teacher.py, with fewer variations.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.trainers.decoder_only_job import CHAT_TEMPLATE
from encdec_slm.trainers.new_models import preset_config
from encdec_slm.trainers.tasks.shell import build_training_rows
from encdec_slm.trainers.tasks.shell_sources import read_fig, read_nl2bash, read_tldr
from encdec_slm.vocabulary import trim_tokenizer


EMBEDDING_SCALE = 0.03


def main():
    arguments = parse_arguments()
    held_out = [row for path in arguments.held_out for row in read_nl2bash(path)]
    nl2bash = read_nl2bash(arguments.nl2bash)
    rows = build_training_rows(
        nl2bash,
        read_tldr(arguments.tldr),
        read_fig(arguments.fig) if arguments.fig else [],
        held_out,
        arguments.copies,
        arguments.everyday_copies,
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.output_dir / "train.jsonl", rows)
    teacher_rows = build_training_rows(nl2bash, [], [], held_out, copies=1, everyday_copies=1)
    write_rows(arguments.output_dir / "teacher.jsonl", teacher_rows)
    texts = (text for row in rows for text in (row.source, row.target))
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    tokenizer, teacher_ids = trim_tokenizer(tokenizer, texts, max_size=arguments.vocabulary_size)
    config = preset_config(arguments.preset, tokenizer)
    config.mlp_dropout = 0.0  # the baseline, a Llama, has none
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher)
    set_seed(arguments.seed)
    embeddings = project_embeddings(teacher.get_input_embeddings().weight[teacher_ids], config.hidden_size)
    student = EncDecSLMForConditionalGeneration(config)
    baseline = AutoModelForCausalLM.from_config(decoder_only_twin(config))
    for name, model in (("student", student), ("baseline", baseline)):
        model.get_input_embeddings().weight.data[: len(embeddings)] = embeddings
        model.save_pretrained(arguments.output_dir / name)
        tokenizer.save_pretrained(arguments.output_dir / name)
        # The baseline reads a request and the token that starts the student's commands, and then generates.
        tokenizer.chat_template = CHAT_TEMPLATE
    counts = ", ".join(f"{count} of {origin}" for origin, count in Counter(row.origin for row in rows).items())
    print(
        f"{len(rows)} rows ({counts}); {student.num_parameters():,} and "
        f"{baseline.num_parameters():,} parameters, {len(tokenizer)} tokens."
    )


def project_embeddings(embeddings, hidden_size):
    """Project embeddings onto their principal components, in directions drawn at random."""
    centered = embeddings.detach().float() - embeddings.detach().float().mean(0)
    components = torch.pca_lowrank(centered, hidden_size, center=False, niter=8)[2]
    rotation = torch.linalg.qr(torch.randn(hidden_size, hidden_size))[0]
    projected = centered @ components @ rotation
    return projected * EMBEDDING_SCALE / projected.square().mean().sqrt()


def write_rows(path, rows):
    lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows)
    write_file(path, "\n".join(lines) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--nl2bash", required=True, help="training rows of NL2Bash")
    parser.add_argument("--held-out", nargs="+", required=True, help="validation and test rows of NL2Bash")
    parser.add_argument("--tldr", required=True, help="clone or archive of tldr-pages")
    parser.add_argument("--fig", help="folder of the npm package @withfig/autocomplete")
    parser.add_argument("--teacher", required=True, help="decoder-only model whose tokenizer and embeddings are used")
    parser.add_argument("--copies", type=int, default=9, help="of each NL2Bash row, with other literals")
    parser.add_argument("--everyday-copies", type=int, default=3, help="of each everyday request, with other words")
    parser.add_argument("--preset", default="10m")
    parser.add_argument("--vocabulary-size", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
