# SPDX-License-Identifier: Apache-2.0
"""Cuts an encoder-decoder from a decoder-only checkpoint, saves and loads it, and trains it on from there.

    python examples/adapt.py outputs/distill_docstrings_teacher outputs/adapted
    python examples/adapt.py SOURCE OUTPUT --distill distill_adapted [--key value ...]
    python examples/adapt.py SOURCE OUTPUT --finetune finetune_docstrings [--key value ...]

SOURCE is a folder or the name of a repository on the Hub: Llama (SmolLM2, TinyLlama), SmolLM3, Mistral without a
sliding window, Qwen2 or Qwen3. The first form needs nothing but the teacher that `make demo` leaves. `--distill` goes
on as `examples/distill.py` does, SOURCE being the teacher; `--finetune` as `examples/finetune.py`; both take the name
or the path of a recipe, and keys that override it. `--help` lists what decides the shape.
"""

from encdec_slm_cli import run_command

from encdec_slm.trainers.run_reports import run_script


def main():
    run_command("adapt")


if __name__ == "__main__":
    run_script(main)
