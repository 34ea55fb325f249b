# SPDX-License-Identifier: Apache-2.0
"""Trains a vision-text model to answer questions about images, and shows how often it is right on held-out ones.

python examples/vqa.py --config configuration/recipes/vqa_synthetic.yaml [--key value ...]

`--config` takes the path of a YAML file or the name of a recipe in `configuration/recipes`; every key of a recipe can
also be given on the command line, which wins. `--help` lists the keys.
"""

from encdec_slm_cli.training import run_vqa

from encdec_slm.trainers.run_reports import run_script


if __name__ == "__main__":
    run_script(run_vqa)
