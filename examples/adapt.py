# SPDX-License-Identifier: Apache-2.0
"""Cuts an encoder-decoder from a decoder-only checkpoint, saves and loads it, and trains it on from there.

    python examples/adapt.py outputs/distill_docstrings_teacher outputs/adapted
    python examples/adapt.py SOURCE OUTPUT --distill distill_adapted [--key value ...]
    python examples/adapt.py SOURCE OUTPUT --finetune finetune_docstrings [--key value ...]

SOURCE is a folder or the name of a repository on the Hub: Llama (SmolLM2, TinyLlama), SmolLM3, Mistral without a
sliding window, Qwen2 or Qwen3. The first form needs nothing but the teacher that `make demo` leaves. `--distill` goes
on with `examples/distill.py`, SOURCE being the teacher; `--finetune` with `examples/finetune.py`; both take the name
or the path of a recipe, and keys that override it. `--help` lists what decides the shape.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.adaptation import STRATEGIES, from_decoder_only, load_tokenizer
from encdec_slm.checkpoint_folders import folder_written_whole
from encdec_slm.configuration.sizes import SPLITS
from encdec_slm.trainers.run_reports import run_script


TEXT = "def area(width, height):\n    return width * height"


def main():
    arguments, keys = parse_arguments()
    adapt(arguments)
    show(arguments.output)
    if script := training_script(arguments):
        print(f"\nGoing on with: {' '.join(script + keys)}\n", flush=True)
        sys.exit(subprocess.call([sys.executable, *script, *keys]))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", help="folder or Hub name of a decoder-only checkpoint")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--encoder_layers", type=int, help="layers of the encoder; default: its share in the split")
    parser.add_argument("--decoder_layers", type=int, help="layers of the decoder, likewise")
    parser.add_argument("--split", default="2/3-1/3", help=f"shares of the source's layers: {', '.join(SPLITS)}")
    parser.add_argument("--strategy", default=STRATEGIES[0], help=f"which layers are kept: {', '.join(STRATEGIES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")
    training = parser.add_mutually_exclusive_group()
    training.add_argument("--distill", metavar="RECIPE", help="distil the source into the result")
    training.add_argument("--finetune", metavar="RECIPE", help="fine-tune the result")
    arguments, keys = parser.parse_known_args()
    if keys and not (arguments.distill or arguments.finetune):
        parser.error(f"unrecognized arguments: {' '.join(keys)}")
    return arguments, keys


def adapt(arguments):
    with folder_written_whole(arguments.output, arguments.overwrite) as folder:
        tokenizer = load_tokenizer(arguments.source)
        model = from_decoder_only(
            arguments.source,
            encoder_layers=arguments.encoder_layers,
            decoder_layers=arguments.decoder_layers,
            split=arguments.split,
            strategy=arguments.strategy,
            tokenizer=tokenizer,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def show(folder):
    """Loads the result as anybody would, and says what it is."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
    config = model.config
    written = model.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=12)
    layers = f"{config.encoder_num_hidden_layers} encoder and {config.decoder_num_hidden_layers} decoder layers"
    print(
        f"{folder}: {model.num_parameters():,} parameters in {model.dtype}, {layers}.\n"
        f"Untrained, it writes for a function of two lines: {tokenizer.decode(written[0], skip_special_tokens=True)!r}"
    )


def training_script(arguments):
    """The command of the training that follows, if any."""
    examples = Path(__file__).parent
    given = ["--model_name_or_path", arguments.output]
    if arguments.distill:
        teacher = ["--teacher_model_name_or_path", arguments.source]
        return [str(examples / "distill.py"), "--config", arguments.distill, *given, *teacher]
    if arguments.finetune:
        return [str(examples / "finetune.py"), "--config", arguments.finetune, *given]
    return None


if __name__ == "__main__":
    run_script(main)
