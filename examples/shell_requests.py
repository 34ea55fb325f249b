# SPDX-License-Identifier: Apache-2.0
"""Choose among requests that a teacher wrote for the commands of rows, and write them as training rows.

    encdec-slm label Qwen/Qwen2.5-Coder-0.5B-Instruct rows.jsonl outputs/question --completions \\
        --prompt-template examples/shell_prompts/request_question.txt --no-chat --max-new-tokens 32 \\
        --temperature 0.8 --top-p 0.95
    python examples/shell_requests.py rows.jsonl outputs/requests.jsonl --labels outputs/question --model MODEL

rows.jsonl has `source` and `target`; the teacher reads both, and writes another request. There are prompts for
questions, terse requests and the words of beginners. MODEL, a shell model, answers each request; one of five answers
has to be the command. [`encdec_slm.trainers.tasks.shell_requests.choose_requests`] has the other filters.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

from encdec_slm_cli.shell_model import load_shell_model

from encdec_slm.checkpoints import write_file
from encdec_slm.trainers.tasks.shell import LiteralVariation
from encdec_slm.trainers.tasks.shell_requests import choose_requests
from encdec_slm.trainers.tasks.shell_sources import read_nl2bash
from encdec_slm.trainers.teacher_cache import TeacherCache


NUM_ANSWERS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="file that was labeled")
    parser.add_argument("output", type=Path)
    parser.add_argument("--labels", nargs="+", required=True, help="folders that `encdec-slm label` wrote")
    parser.add_argument("--model", help="shell model for the round trip; default: the shipped one")
    arguments = parser.parse_args()

    rows, model = read_nl2bash(arguments.rows), load_shell_model(arguments.model)
    candidates = defaultdict(list)
    for folder in arguments.labels:
        cache = TeacherCache(folder)
        for example in cache.read(0, cache.num_rows):
            # The teacher may go on with another turn.
            candidates[example["row"]].append(example["completion"].strip().partition("\n")[0])
    variation = LiteralVariation(rows)

    def answer(request):
        return [one.command for one in model.answer(request, NUM_ANSWERS)]

    chosen = [
        one for index, texts in candidates.items() for one in choose_requests(rows[index], texts, variation, answer)
    ]
    write_file(arguments.output, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in chosen))
    print(f"{sum(map(len, candidates.values())):,} requests were written, and {len(chosen):,} are kept.")


if __name__ == "__main__":
    main()
