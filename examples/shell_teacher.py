# SPDX-License-Identifier: Apache-2.0
"""Tune the decoder-only teacher of the shell model by LoRA, on the rows and with the tokenizer of its student.

    python examples/shell_teacher.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --tokenizer outputs/shell_data/baseline --train_file outputs/shell_data/teacher.jsonl \\
        --output_dir outputs/shell_teacher

First, its embeddings are trimmed to the tokens that the student has, which leaves 363M of 494M parameters. It reads a
request and the token that starts the student's commands, and learns to predict the command. Options are keys of the
recipe `finetune_shell`. A stopped run resumes. OUTPUT_DIR/merged has the tuned model, for `encdec-slm label`.
"""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainingArguments
from trl import ModelConfig, TrlParser, get_peft_config

from encdec_slm.trainers.decoder_only_job import KIND, train_causal_model
from encdec_slm.trainers.finetune_job import LORA_TARGET_MODULES, FinetuneArguments
from encdec_slm.trainers.resuming import prepare_output_dir
from encdec_slm.trainers.seq2seq_data import load_splits
from encdec_slm.vocabulary import old_token_ids


RECIPE = Path(__file__).resolve().parent.parent / "configuration" / "recipes" / "finetune_shell.yaml"


@dataclass
class TeacherArguments(FinetuneArguments):
    """`tokenizer` (`str`): Folder of the trimmed tokenizer, with the chat template of a decoder-only model."""

    tokenizer: str = "outputs/shell_data/baseline"


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = TrlParser((TeacherArguments, Seq2SeqTrainingArguments, ModelConfig))
    args, training_args, model_args = parser.parse_args_and_config(["--config", str(RECIPE), *sys.argv[1:]])
    training_args.eval_strategy = "no"
    name = model_args.model_name_or_path
    checkpoint = prepare_output_dir(training_args, KIND, [name], args.data_files)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    # Only the adapters are trained, so bfloat16 is enough for the others.
    model = trim_embeddings(AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), tokenizer)
    config = replace(
        model_args, use_peft=True, lora_target_modules=list(LORA_TARGET_MODULES), lora_task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, get_peft_config(config))
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
    )
    merged = Path(training_args.output_dir) / "merged"
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)


def trim_embeddings(model, tokenizer):
    """Keep the embeddings of a trimmed tokenizer's tokens, in its order; they are tied to the output head."""
    if model.config.vocab_size != len(tokenizer):  # else a tuned teacher is tuned further
        rows = model.get_input_embeddings().weight.data[old_token_ids(tokenizer)]
        model.resize_token_embeddings(len(rows), mean_resizing=False)
        model.get_input_embeddings().weight.data.copy_(rows)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.config.update(special)
    model.generation_config.update(**special)
    return model


if __name__ == "__main__":
    main()
