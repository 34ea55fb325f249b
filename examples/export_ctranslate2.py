# SPDX-License-Identifier: Apache-2.0
"""Exports a text model of this family to CTranslate2, which runs it on CPUs and NVIDIA GPUs, in int8 by default.

python examples/export_ctranslate2.py MODEL OUTPUT [--quantization int8] [--agreement] [--rows 100] [--overwrite]

`MODEL` is a folder that `save_pretrained` wrote, or a name on the Hub. `--agreement` then reads held-out rows of the
docstring task (Python functions, and the first sentences of their docstrings) with the model in float32 and with the
export, and prints how much of what they write is equal, and the ROUGE-L of both. Does not export vision-text models.
"""

from encdec_slm_cli import run_command

from encdec_slm.trainers.run_reports import run_script


def main():
    run_command("export")


if __name__ == "__main__":
    run_script(main)
