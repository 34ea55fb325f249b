# SPDX-License-Identifier: Apache-2.0
"""Exports a model of this family to ONNX, for onnxruntime, OpenVINO, browsers and NPUs.

python examples/export_onnx.py MODEL OUTPUT [--quantization int8] [--static-lengths 64 256] [--agreement] [--rows 100]

`MODEL` is a folder that `save_pretrained` wrote, or a name on the Hub. `--quantization` is `int8` (activations are
measured when the model runs) or `int8_static` (they are measured now, on held-out functions of the docstring task);
without it the export is in float32. `--static-lengths` makes graphs of fixed shape for NPUs, one per source length.
`--agreement` then reads held-out rows of the docstring task with the model in float32 and with the export, and prints
how much of what they write is equal, and the ROUGE-L of both; not for vision-text models.
"""

from encdec_slm_cli import run_command

from encdec_slm.trainers.run_reports import run_script


def main():
    run_command("export", "--format", "onnx")


if __name__ == "__main__":
    run_script(main)
