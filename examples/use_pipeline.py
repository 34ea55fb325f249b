# SPDX-License-Identifier: Apache-2.0
"""Use a checkpoint with transformers alone: its folder has its code.

python examples/use_pipeline.py FOLDER TEXT
"""

import logging
import sys


def main(folder, text):
    # transformers imports torchao, which logs which of its kernels this machine does not have.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from transformers import pipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pipe = pipeline("text2text-generation", model=folder, trust_remote_code=True)
    print(pipe(text)[0]["generated_text"])


if __name__ == "__main__":
    main(*sys.argv[1:])
