# SPDX-License-Identifier: Apache-2.0
"""Exports a model of this family to ONNX, for onnxruntime, OpenVINO, browsers and NPUs.

python examples/export_onnx.py MODEL OUTPUT [--quantization int8] [--static-lengths 64 256] [--agreement] [--rows 100]

`MODEL` is a folder that `save_pretrained` wrote, or a name on the Hub. `--quantization` is `int8` (activations are
measured when the model runs) or `int8_static` (they are measured now, on held-out functions of the docstring task);
without it the export is in float32. `--static-lengths` makes graphs of fixed shape for NPUs, one per source length.
`--agreement` then reads held-out rows of the docstring task with the model in float32 and with the export, and prints
how much of what they write is equal, and the ROUGE-L of both; not for vision-text models.
"""

import argparse

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.export import OrtEncDecSLM, export_onnx
from encdec_slm.trainers.docstring_task import build_docstring_task
from encdec_slm.trainers.engine_agreement import agreement
from encdec_slm.trainers.run_reports import run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--quantization", help="int8 or int8_static; float32 without it")
    parser.add_argument("--static-lengths", type=int, nargs="+", metavar="N", help="source lengths of fixed graphs")
    parser.add_argument("--agreement", action="store_true", help="compare it with the model on held-out rows")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="how many rows are compared")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that lies in OUTPUT")
    args = parser.parse_args()
    options = {"quantization": args.quantization, "static_lengths": args.static_lengths, "overwrite": args.overwrite}
    folder = export_onnx(args.model, args.output, **options).resolve()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Wrote {size / 1e6:,.1f} MB in {args.quantization or 'float32'} to {folder}. Load it with\n")
    print(f"    OrtEncDecSLM.from_pretrained({str(folder)!r})")
    if args.agreement:
        _print_agreement(args, folder)


def _print_agreement(args, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype="float32").eval()
    # Rows for calibration are of the test split.
    rows = build_docstring_task()["validation"].shuffle(seed=0)
    if args.static_lengths:
        rows = rows.filter(lambda row: len(tokenizer(row["source"])["input_ids"]) <= max(args.static_lengths))
    rows = rows.select(range(min(args.rows, len(rows))))
    scores = agreement(model, OrtEncDecSLM.from_pretrained(folder), tokenizer, rows["source"], rows["target"])
    print(f"\nOn {len(rows)} held-out rows of the docstring task, beside the model in float32:")
    print(f"  equal tokens      {scores['token_match']:6.2f} %")
    print(f"  equal targets     {scores['exact_match']:6.2f} %")
    print(f"  ROUGE-L           {scores['rougeL_exported']:6.2f}, of the model {scores['rougeL_model']:.2f}")


if __name__ == "__main__":
    run_script(main)
