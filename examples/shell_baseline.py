# SPDX-License-Identifier: Apache-2.0
"""Train the decoder-only baseline of the shell model on the same rows, for as many steps, by the same recipe.

    python examples/shell_baseline.py --bf16 true --use_cpu true --output_dir outputs/shell_baseline \\
        --model_name_or_path outputs/shell_data/baseline

It learns to predict the commands, and not the requests. Options are keys of the recipe `finetune_shell`.
"""

import logging
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainingArguments
from trl import ModelConfig, TrlParser

from encdec_slm.trainers.decoder_only_job import KIND, train_causal_model
from encdec_slm.trainers.finetune_job import FinetuneArguments
from encdec_slm.trainers.resuming import prepare_output_dir
from encdec_slm.trainers.seq2seq_data import load_splits


RECIPE = Path(__file__).resolve().parent.parent / "configuration" / "recipes" / "finetune_shell.yaml"


def main():
    train_on_commands(load_baseline)


def load_baseline(name, args, model_args):
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype="float32", attn_implementation=model_args.attn_implementation
    )
    return model, AutoTokenizer.from_pretrained(name)


def train_on_commands(load, arguments_class=FinetuneArguments):
    """Train what `load(name, args, model_args)` returns, a model and its tokenizer; return both and the folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = TrlParser((arguments_class, Seq2SeqTrainingArguments, ModelConfig))
    args, training_args, model_args = parser.parse_args_and_config(["--config", str(RECIPE), *sys.argv[1:]])
    training_args.eval_strategy = "no"
    name = model_args.model_name_or_path
    checkpoint = prepare_output_dir(training_args, KIND, [name], args.data_files)
    model, tokenizer = load(name, args, model_args)
    train_causal_model(
        model,
        tokenizer,
        load_splits(args, training_args.seed)["train"],
        training_args,
        args.max_source_length,
        args.max_target_length,
        checkpoint,
        base_model=name,
        supervise_source=False,
        optimizer=args.optimizer,
    )
    return model, tokenizer, Path(training_args.output_dir)


if __name__ == "__main__":
    main()
