# SPDX-License-Identifier: Apache-2.0
"""Use a checkpoint with transformers alone: its folder has its code.

    python examples/use_pipeline.py FOLDER TEXT
"""

import sys

from transformers import pipeline


folder, text = sys.argv[1:]
pipe = pipeline("text2text-generation", model=folder, trust_remote_code=True)
print(pipe(text)[0]["generated_text"])
