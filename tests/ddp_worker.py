# SPDX-License-Identifier: Apache-2.0
"""One small training run, the same however many processes share its batches.

python ddp_worker.py <output_dir> <rows per process> splits it over two processes; so does torchrun, put in front.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import debug_launcher
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration


def build(seed=0, **switches):
    """A two-layer model with every tensor drawn from `seed`."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
    }
    model = EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**sizes, **switches}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
    return model


def make_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 97)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def make_rows(num_rows=16, seed=3):
    """Rows whose numbers of source and of supervised tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        source = torch.randint(4, 97, (3 + index % 4,), generator=generator).tolist()
        labels = torch.randint(4, 97, (1 + index * 5 % 9,), generator=generator).tolist()
        rows.append({"input_ids": source, "labels": [-100] * (index % 3) + labels + [2]})
    return rows


def make_trainer(model, output_dir, rows=None, **settings):
    """A trainer whose updates are proportional to the gradient, so that a wrong scale shows."""
    tokenizer = make_tokenizer()
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,  # logs the norm and never clips
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(output_dir, **{**defaults, **settings}),
        DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=make_rows() if rows is None else rows,
        processing_class=tokenizer,
    )


def history_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def main(output_dir, batch_size):
    model = build()
    trainer = make_trainer(model, output_dir, per_device_train_batch_size=int(batch_size))
    trainer.train()
    if trainer.is_world_process_zero():
        result = {
            "num_processes": trainer.accelerator.num_processes,
            "losses": history_of(trainer),
            "gradient_norms": history_of(trainer, "grad_norm"),
            "weights": model.state_dict(),
        }
        torch.save(result, Path(output_dir) / "result.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        main(*sys.argv[1:])
    else:
        debug_launcher(main, sys.argv[1:], num_processes=2)
