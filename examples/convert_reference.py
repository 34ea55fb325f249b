# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of the predecessor, microsoft/encoder-decoder-slm, into a model folder of this family.

python examples/convert_reference.py PATH OUTPUT [--tokenizer FOLDER] [--overwrite]

`PATH` is the predecessor's `model.pt` (its repository keeps it in Git LFS: run `git lfs pull` there). `FOLDER` holds
the `tokenizer.json` that it was trained with, or is a name on the Hub; that of the released checkpoint is
microsoft/Phi-3.5-mini-instruct. Without it, a tokenizer that lies beside `PATH` is taken.
"""

import argparse

from encdec_slm.conversion import convert_reference_checkpoint
from encdec_slm.trainers.run_reports import run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--tokenizer", metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that lies in OUTPUT")
    args = parser.parse_args()
    folder = convert_reference_checkpoint(
        args.path, args.output, tokenizer=args.tokenizer, overwrite=args.overwrite
    ).resolve()
    print(f"Wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}. Load it with\n")
    print(f"    AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    run_script(main)
