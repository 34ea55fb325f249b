# SPDX-License-Identifier: Apache-2.0
"""Measures prompt-lookup decoding on the docstring task: greedy text with and without candidates from the source.

    python examples/prompt_lookup.py outputs/finetune_docstrings --num-tokens 2 5 10

Each of the lines printed is a way to decode: tokens written per decoder step, the share of candidates that the model
accepts, and seconds per text, as medians over held-out rows. The ways take turns at each row, so that a busy moment of
the machine hits all. Ends with an error if a text differs from greedy search's.
"""

import argparse
import sys
import time
from collections import Counter
from statistics import median

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.trainers.tasks.docstrings import build_docstring_task


def write_text(model, source_ids, num_tokens, max_new_tokens):
    """Ids of the text, decoder steps, candidates and seconds; `num_tokens` 0 is plain greedy search."""
    counts = Counter()

    def count(_, args, kwargs):
        # A step reads one token that is known, and the candidates after it.
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


def measure(model, sources, ways, max_new_tokens):
    """Per way to decode, one `(ids, steps, candidates, seconds)` for each source."""
    runs = {num_tokens: [] for num_tokens in ways}
    for position, source_ids in enumerate([sources[0], *sources]):  # the first once more, to warm up
        for num_tokens in ways:
            run = write_text(model, source_ids, num_tokens, max_new_tokens)
            if position:
                runs[num_tokens].append(run)
    return runs


def describe(name, runs, plain):
    written = [len(ids) - 1 for ids, *_ in runs]  # the start token is given
    accepted = sum(written) - sum(run[1] for run in runs)
    num_candidates = sum(run[2] for run in runs)
    share = f"{accepted / num_candidates:.0%} of {num_candidates} candidates" if num_candidates else "no candidates"
    ratio = median(one[3] / other[3] for one, other in zip(plain, runs, strict=True))
    return (
        f"{name:22} {sum(written) / sum(run[1] for run in runs):.2f} tokens per step ({share} accepted), "
        f"{1e3 * median(run[3] for run in runs):.1f} ms per text, {ratio:.2f} x greedy search's speed"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of `encdec-slm finetune` or `distill`")
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[2, 5, 10], help="most candidates per step")
    parser.add_argument("--rows", type=int, default=100, help="held-out functions")
    parser.add_argument("--max-source-length", type=int, default=96, help="tokens; longer sources are cut")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    if min(*arguments.num_tokens, arguments.rows, arguments.max_source_length, arguments.max_new_tokens) < 1:
        parser.error("all numbers must be at least 1")
    return arguments


def main():
    arguments = parse_arguments()
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = build_docstring_task()["test"].shuffle(seed=0)["source"][: arguments.rows]
    cut = {"truncation": True, "max_length": arguments.max_source_length}
    sources = [tokenizer(row, return_tensors="pt", **cut).input_ids for row in rows]
    runs = measure(model, sources, (0, *arguments.num_tokens), arguments.max_new_tokens)
    print(f"{len(sources)} texts of {sum(len(run[0]) - 1 for run in runs[0]) / len(sources):.1f} tokens on average")
    print(describe("greedy search", runs[0], runs[0]))
    for num_tokens in arguments.num_tokens:
        print(describe(f"up to {num_tokens} candidates", runs[num_tokens], runs[0]))
    different = sum(one[0] != other[0] for ways in runs.values() for one, other in zip(runs[0], ways, strict=True))
    if different:
        sys.exit(f"prompt_lookup.py: {different} texts differ from those of greedy search")


if __name__ == "__main__":
    main()
