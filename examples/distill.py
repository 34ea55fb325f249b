# SPDX-License-Identifier: Apache-2.0
"""Teaches an encoder-decoder student by a decoder-only teacher, and compares it with a student without one.

python examples/distill.py --config configuration/recipes/distill_docstrings.yaml [--key value ...]

`--config` takes the path of a YAML file or the name of a recipe in `configuration/recipes`; every key of a recipe can
also be given on the command line, which wins: `--teacher_model_name_or_path` takes any decoder-only model and
`--dataset_name` any data set of the Hub. `--help` lists the keys.
"""

from encdec_slm_cli.training import run_distill

from encdec_slm.trainers.run_reports import run_script


if __name__ == "__main__":
    run_script(run_distill)
