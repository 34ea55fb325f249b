# SPDX-License-Identifier: Apache-2.0
"""Tune the decoder-only teacher of the shell model by LoRA, on the rows and with the tokenizer of its student.

    python examples/shell_teacher.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --tokenizer outputs/shell_data/baseline --train_file outputs/shell_data/teacher.jsonl \\
        --optimizer adamw --learning_rate 4e-4 --output_dir outputs/shell_teacher

First, its embeddings are trimmed to the tokens that the student has, which leaves 363M of 494M parameters. It reads a
request and the token that starts the student's commands, and learns to predict the command. Options are keys of the
recipe `finetune_shell`. A stopped run resumes. OUTPUT_DIR/merged has the tuned model, for `encdec-slm label`.
"""

from dataclasses import dataclass, replace

import torch
from peft import get_peft_model
from shell_baseline import train_on_commands
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config

from encdec_slm.trainers.finetune_job import LORA_TARGET_MODULES, FinetuneArguments
from encdec_slm.vocabulary import old_token_ids


@dataclass
class TeacherArguments(FinetuneArguments):
    """`tokenizer` (`str`): Folder of the trimmed tokenizer, with the chat template of a decoder-only model."""

    tokenizer: str = "outputs/shell_data/baseline"


def main():
    model, tokenizer, folder = train_on_commands(load_teacher, TeacherArguments)
    model.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")


def load_teacher(name, args, model_args):
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    # Only the adapters are trained, so bfloat16 is enough for the others.
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, attn_implementation=model_args.attn_implementation
    )
    model = trim_embeddings(model, tokenizer)
    config = replace(
        model_args, use_peft=True, lora_target_modules=list(LORA_TARGET_MODULES), lora_task_type="CAUSAL_LM"
    )
    return get_peft_model(model, get_peft_config(config)), tokenizer


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
