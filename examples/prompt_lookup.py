# SPDX-License-Identifier: Apache-2.0
"""Measure prompt-lookup decoding on the docstring task: greedy search with and without candidates from the source.

    python examples/prompt_lookup.py outputs/finetune_docstrings --num-tokens 2 5 10

Prints, for greedy search and for each number of candidates: tokens per decoder step, the share of candidates that the
model accepts, and milliseconds per text, as medians over held-out rows. They take turns at each row, so that a busy
moment of the machine affects all. Fails if a text differs from that of greedy search.
"""

import argparse
import sys
import time
from collections import Counter
from statistics import median

import torch

from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.trainers.tasks.docstrings import build_docstring_task


def generate(model, source_ids, num_tokens, max_new_tokens):
    """Return ids, decoder steps, candidates and seconds of one text; `num_tokens` 0 is greedy search."""
    counts = Counter()

    def count(_, args, kwargs):
        # A step reads one known token and the candidates after it.
        counts.update(steps=1, candidates=kwargs["inputs_embeds"].shape[1] - 1)

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    start = time.perf_counter()
    ids = model.generate(
        source_ids,
        attention_mask=torch.ones_like(source_ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        prompt_lookup_num_tokens=num_tokens or None,
    )
    seconds = time.perf_counter() - start
    hook.remove()
    return ids[0].tolist(), counts["steps"], counts["candidates"], seconds


def measure(model, sources, nums_tokens, max_new_tokens):
    """Return the results of `generate` for each source, by number of candidates."""
    runs = {num_tokens: [] for num_tokens in nums_tokens}
    for position, source_ids in enumerate([sources[0], *sources]):  # the first once more, to warm up
        for num_tokens in nums_tokens:
            run = generate(model, source_ids, num_tokens, max_new_tokens)
            if position:
                runs[num_tokens].append(run)
    return runs


def describe(name, runs, greedy):
    num_generated = sum(len(ids) - 1 for ids, *_ in runs)  # without the start token
    num_steps, num_candidates = sum(run[1] for run in runs), sum(run[2] for run in runs)
    accepted = f"{(num_generated - num_steps) / num_candidates:.0%}" if num_candidates else "none"
    ratio = median(one[3] / other[3] for one, other in zip(greedy, runs, strict=True))
    return (
        f"{name:22} {num_generated / num_steps:.2f} tokens per step ({accepted} of {num_candidates} candidates "
        f"accepted), {1e3 * median(run[3] for run in runs):.1f} ms per text, {ratio:.2f} x greedy search's speed"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model that was trained on the docstring task")
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[2, 5, 10], help="most candidates per step")
    parser.add_argument("--rows", type=int, default=100, help="held-out functions")
    parser.add_argument("--max-source-length", type=int, default=96, help="tokens; longer sources are truncated")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    if min(*arguments.num_tokens, arguments.rows, arguments.max_source_length, arguments.max_new_tokens) < 1:
        parser.error("all numbers must be at least 1")
    return arguments


def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.model)
    rows = build_docstring_task()["test"].shuffle(seed=0)["source"][: arguments.rows]
    truncation = {"truncation": True, "max_length": arguments.max_source_length}
    sources = [tokenizer(row, return_tensors="pt", **truncation).input_ids for row in rows]
    runs = measure(model, sources, (0, *arguments.num_tokens), arguments.max_new_tokens)
    print(f"{len(sources)} texts of {sum(len(run[0]) - 1 for run in runs[0]) / len(sources):.1f} tokens on average")
    print(describe("greedy search", runs[0], runs[0]))
    for num_tokens in arguments.num_tokens:
        print(describe(f"up to {num_tokens} candidates", runs[num_tokens], runs[0]))
    different = sum(one[0] != other[0] for run in runs.values() for one, other in zip(runs[0], run, strict=True))
    if different:
        sys.exit(f"prompt_lookup.py: {different} texts differ from those of greedy search")


if __name__ == "__main__":
    main()
