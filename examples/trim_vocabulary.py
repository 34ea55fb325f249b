# SPDX-License-Identifier: Apache-2.0
"""Trim a teacher's vocabulary to the docstring task, and measure what smaller vocabularies cost.

    python examples/trim_vocabulary.py TEACHER [--sizes 8000 4000] [--rows 40] [--output_dir outputs/trimmed]

Counts tokens on the training rows. On held-out rows it prints, for the whole trimmed vocabulary and for each size: how
many more tokens sources and targets take, the share of targets that are tokenized identically, and the probability
that the teacher gives to the kept tokens where it predicts the target (`kept mass`, on the first `--rows` rows). The
tokenizer of the last size is saved to `--output_dir`. Not supported: another task.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from encdec_slm.checkpoints import check_no_overlap
from encdec_slm.trainers.row_encoding import iterate_texts
from encdec_slm.trainers.tasks.docstrings import build_docstring_task
from encdec_slm.vocabulary import report_trim, trim_tokenizer


INSTRUCTION = "Say in one sentence what this Python function does, as its docstring would."


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="Folder or Hub name of a decoder-only model with a chat template.")
    parser.add_argument("--sizes", type=int, nargs="*", default=[8000, 4000], help="Vocabulary sizes.")
    parser.add_argument("--rows", type=int, default=40, help="Held-out rows for the kept mass; 0 loads no weights.")
    parser.add_argument("--output_dir", help="Folder for the smallest tokenizer.")
    args = parser.parse_args(arguments)
    if args.output_dir:
        check_no_overlap(args.output_dir, [args.teacher])

    splits = build_docstring_task()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype="float32").eval() if args.rows else None
    print(
        f"{'tokens':>8} {'more source tokens':>19} {'more target tokens':>19} {'equal targets':>14} {'kept mass':>10}"
    )
    for size in (None, *args.sizes):
        trimmed, old_ids = trim_tokenizer(tokenizer, iterate_texts(splits["train"]), max_size=size)
        source, target = (report_trim(trimmed, tokenizer, splits["test"][name]) for name in ("source", "target"))
        mass = (
            f"{measure_kept_mass(model, tokenizer, trimmed, old_ids, splits['test'].take(args.rows)):10.1%}"
            if model
            else ""
        )
        print(
            f"{len(trimmed):8,} {source.extra_tokens:19.1%} {target.extra_tokens:19.1%} "
            f"{target.identical_share:14.1%} {mass}",
            flush=True,
        )
    if args.output_dir:
        trimmed.save_pretrained(args.output_dir)


@torch.no_grad()
def measure_kept_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trimmed: PreTrainedTokenizerBase,
    old_ids: Sequence[int],
    rows: Sequence[dict[str, str]],
) -> float:
    """Return the mean probability of the kept tokens where a teacher predicts the targets of rows."""
    masses = []
    for row in rows:
        messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{row['source']}"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        target = [old_ids[token_id] for token_id in trimmed(row["target"], add_special_tokens=False)["input_ids"]]
        logits = model(input_ids=torch.tensor([prompt + target]), logits_to_keep=len(target) + 1).logits[0]
        masses.append(logits.softmax(-1)[:, old_ids].sum(-1))
    return torch.cat(masses).mean().item()


if __name__ == "__main__":
    main()
