# SPDX-License-Identifier: Apache-2.0
"""Writes the output of a saved model for one text; needs transformers only, not this package.

python examples/generate.py outputs/finetune_docstrings [file with the source text]
"""

import sys
from pathlib import Path

from transformers import pipeline


FUNCTION = """\
def remove_suffix(path, suffix):
    if suffix and path.endswith(suffix):
        return path[:-len(suffix)]
    return path
"""


def main(folder, file=None):
    source = FUNCTION if file is None else Path(file).read_text(encoding="utf-8")
    writer = pipeline("text2text-generation", model=folder, trust_remote_code=True)
    try:
        written = writer(source)[0]["generated_text"]
    except ValueError as error:  # a source that the model is too short for
        sys.exit(f"generate.py: {error}")
    num_millions = writer.model.num_parameters() / 1e6
    print(f"{source.rstrip()}\n\n-> {written}\n")
    print(f"Written by a model of {num_millions:.1f}M parameters: expect the form of an answer more than its truth.")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
