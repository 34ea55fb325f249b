# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes an encoder-decoder as a recipe says, and shows what that changed on held-out rows.

python examples/finetune.py --config configuration/recipes/finetune_docstrings.yaml [--key value ...]

`--config` takes the path of a YAML file or the name of a recipe in `configuration/recipes`; every key of a recipe can
also be given on the command line, which wins. `--help` lists the keys.
"""

from encdec_slm_cli.training import run_finetune

from encdec_slm.trainers.run_reports import run_script


if __name__ == "__main__":
    run_script(run_finetune)
