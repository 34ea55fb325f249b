# SPDX-License-Identifier: Apache-2.0
"""Score a baseline without a model on shell commands: answer with the commands of the nearest training requests.

    python examples/nearest_request.py train.jsonl test_random.jsonl outputs/nearest_test_random

Requests are compared by the Jaccard similarity of their words. Writes evaluation.json and predictions.jsonl, as
`encdec-slm evaluate --task shell` does for a model.
"""

import heapq
import json
import re
import sys

from encdec_slm.run_results import comparison_table, format_table
from encdec_slm.trainers.evaluation import evaluate_checkpoint


NUM_ANSWERS = 5


def build_nearest(train_file):
    """Return a function from requests to the commands of the nearest training requests."""
    with open(train_file, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    known = [(split_words(row["source"]), row["target"]) for row in rows]

    def nearest_request(sources):
        return [find_commands(split_words(source), known) for source in sources]

    return nearest_request


def split_words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def find_commands(words, known):
    nearest = heapq.nlargest(4 * NUM_ANSWERS, known, key=lambda row: len(words & row[0]) / len(words | row[0] | {""}))
    return list(dict.fromkeys(command for _, command in nearest))[:NUM_ANSWERS]


def main(train_file, test_file, output_dir):
    function = build_nearest(train_file)
    results = evaluate_checkpoint(function, "shell", dataset_name=test_file, output_dir=output_dir, batch_size=100)
    print(format_table(comparison_table(results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
