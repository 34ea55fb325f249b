# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of the predecessor, microsoft/encoder-decoder-slm, into a model folder of this family.

python examples/convert_reference.py PATH OUTPUT [--tokenizer FOLDER] [--overwrite]

`PATH` is the predecessor's `model.pt` (its repository keeps it in Git LFS: run `git lfs pull` there). `FOLDER` holds
the `tokenizer.json` that it was trained with, or is a name on the Hub; that of the released checkpoint is
microsoft/Phi-3.5-mini-instruct. Without it, a tokenizer that lies beside `PATH` is taken.
"""

from encdec_slm_cli import run_command

from encdec_slm.trainers.run_reports import run_script


def main():
    run_command("convert")


if __name__ == "__main__":
    run_script(main)
