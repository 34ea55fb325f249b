# SPDX-License-Identifier: Apache-2.0
"""Exports a text model of this family to CTranslate2, which runs it on CPUs and NVIDIA GPUs, in int8 by default.

python examples/export_ctranslate2.py MODEL OUTPUT [--quantization int8] [--agreement] [--rows 100] [--overwrite]

`MODEL` is a folder that `save_pretrained` wrote, or a name on the Hub. `--agreement` then reads held-out rows of the
docstring task (Python functions, and the first sentences of their docstrings) with the model in float32 and with the
export, and prints how much of what they write is equal, and the ROUGE-L of both. Does not export vision-text models.
"""

import argparse

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.export import CT2EncDecSLM, export_ctranslate2
from encdec_slm.trainers.docstring_task import build_docstring_task
from encdec_slm.trainers.engine_agreement import agreement
from encdec_slm.trainers.run_reports import run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--quantization", default="int8", help="int8, float32, ...: how weights are stored")
    parser.add_argument("--agreement", action="store_true", help="compare it with the model on held-out rows")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="how many rows are compared")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that lies in OUTPUT")
    args = parser.parse_args()
    folder = export_ctranslate2(args.model, args.output, args.quantization, overwrite=args.overwrite).resolve()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Wrote {size / 1e6:,.1f} MB in {args.quantization} to {folder}. Load it with\n")
    print(f"    CT2EncDecSLM.from_pretrained({str(folder)!r})")
    if args.agreement:
        _print_agreement(args, folder)


def _print_agreement(args, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype="float32").eval()
    test = build_docstring_task()["test"].shuffle(seed=0)
    rows = test.select(range(min(args.rows, len(test))))
    exported = CT2EncDecSLM.from_pretrained(folder)
    scores = agreement(model, exported, tokenizer, rows["source"], rows["target"])
    engine = exported.translator.compute_type
    print(f"\nOn {len(rows)} held-out rows of the docstring task, beside the model in float32:")
    print(f"  equal tokens      {scores['token_match']:6.2f} %")
    print(f"  equal targets     {scores['exact_match']:6.2f} %")
    print(f"  ROUGE-L           {scores['rougeL_exported']:6.2f} in {engine}, {scores['rougeL_model']:.2f} in float32")


if __name__ == "__main__":
    run_script(main)
