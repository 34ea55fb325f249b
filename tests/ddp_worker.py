# SPDX-License-Identifier: Apache-2.0
"""A small training run that is the same for any number of processes that share its batches.

python ddp_worker.py <output_dir> <rows per process> splits it over two processes; so does torchrun.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import debug_launcher
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from conftest import build_model, build_tokenizer
from encdec_slm.trainers.jobs import before_training


# Updates are proportional to the gradient, so that a wrong scale shows.
SGD = {
    **{"learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant"},
    "max_grad_norm": 1e9,  # logs the norm and never clips
    **{"logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "no", "report_to": []},
    **{"use_cpu": True, "disable_tqdm": True},
}


def build(seed=0, **fields):
    """A tiny model with small weights, in training mode."""
    model = build_model(seed=seed, **fields).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(0.5)
    return model


def make_tokenizer():
    return build_tokenizer(ends_sources=False)


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
    tokenizer = make_tokenizer()
    settings = {**SGD, "per_device_train_batch_size": 8, "max_steps": 3, **settings}
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(output_dir, **settings),
        DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=make_rows() if rows is None else rows,
        processing_class=tokenizer,
    )


def history_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def result_of(trainer):
    return {
        "num_processes": trainer.accelerator.num_processes,
        "losses": history_of(trainer),
        "gradient_norms": history_of(trainer, "grad_norm"),
        "weights": dict(trainer.accelerator.unwrap_model(trainer.model).state_dict()),
    }


def main(output_dir, batch_size):
    trainer = make_trainer(build(), output_dir, per_device_train_batch_size=int(batch_size))
    with before_training(trainer):
        trainer.evaluate(make_rows(4))
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(result_of(trainer), Path(output_dir) / "result.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        main(*sys.argv[1:])
    else:
        debug_launcher(main, sys.argv[1:], num_processes=2)
