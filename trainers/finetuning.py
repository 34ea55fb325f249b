# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes an encoder-decoder on `source` and `target` text, and measures what that changed on held-out rows."""

import copy
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..checkpoint_folders import first_line
from ..hub_cards.cards import model_card
from ..modeling_encdec_slm import EncDecSLMForConditionalGeneration
from .run_reports import (
    checkpoint_to_resume,
    first_lines,
    held_out_texts,
    preset_config,
    show_losses,
    validation_losses,
    versions,
    write_file,
    write_run_files,
)
from .seq2seq_data import DataArguments, first_texts, load_splits, log_cut_rows, tokenize_splits, train_tokenizer


logger = logging.getLogger(__name__)

# What LoRA adapts in this family unless a recipe says otherwise: every projection of `self_attn` in both stacks, of
# `cross_attn` (PEFT matches the ends of names) and of the MLPs. QLoRA adapts the same over a quantized base:
# `load_in_4bit: true` in the recipe, on a GPU with `bitsandbytes` installed.
LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class FinetuneArguments(DataArguments):
    """What [`finetune`] trains on and, without a checkpoint, what model it begins with.

    Args: those of [`~encdec_slm.trainers.seq2seq_data.DataArguments`], and
        preset (`str`, *optional*, defaults to `"tiny"`): Size of a new model; see
            [`~encdec_slm.configuration.list_presets`]. Not read when the recipe has `model_name_or_path`.
        vocab_size (`int`, *optional*, defaults to 4096): Upper bound for the tokenizer of a new model.
        max_source_length (`int`, *optional*, defaults to 256): In tokens; the rest is cut and the rows are counted.
        max_target_length (`int`, *optional*, defaults to 48): In tokens, likewise; also bounds what is generated.
    """

    preset: str = field(default="tiny", metadata={"help": "Size of a new model."})
    vocab_size: int = field(default=4096, metadata={"help": "Upper bound for a newly trained tokenizer."})
    max_source_length: int = field(default=256, metadata={"help": "Longest source, in tokens."})
    max_target_length: int = field(default=48, metadata={"help": "Longest target, in tokens."})


def finetune(
    args: FinetuneArguments, training_args: Seq2SeqTrainingArguments, model_args: ModelConfig | None = None
) -> dict[str, Any]:
    """Trains, saves model and tokenizer to `training_args.output_dir`, and measures held-out rows before and after.

    Beside them are written `results.json` (what is returned), `predictions.jsonl`, `loss.png` and a model card.

    Args:
        args ([`FinetuneArguments`]): Data and size.
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): The run. `predict_with_generate` is on and
            `generation_max_length` follows `max_target_length` in any case. `resume_from_checkpoint: "true"` goes on
            from the last checkpoint in the folder.
        model_args ([`~trl.ModelConfig`], *optional*): A checkpoint to begin with, and LoRA. `None` begins with new
            weights of `args.preset` and a tokenizer trained on the training split.

    Returns:
        `dict`: `before` and `after`, each with `loss` (nats per token), `rougeL` and `exact` (percent), and
        `rougeL_other_rows`: the same texts beside other rows' references, which is what the form of a text earns
        without its content. `validation`: the losses on the way, each with its `step`. Also sizes, seconds, versions
        and `samples`.

    Raises:
        ValueError: The data or the sizes do not fit; the message says what to change.
        TypeError: A row's `source` or `target` is no text.
    """
    model_args = ModelConfig() if model_args is None else model_args
    if args.dataset_streaming and training_args.max_steps <= 0:
        raise ValueError(
            "`dataset_streaming` is true and `max_steps` is not set, but a stream has no known end. Set `max_steps` "
            "to the number of optimizer steps."
        )
    if model_args.use_peft and not model_args.model_name_or_path:
        raise ValueError(
            "`use_peft` is true and `model_name_or_path` is not set, but adapters need trained weights beneath them. "
            "Set it to a saved folder or a model on the Hub."
        )
    set_seed(training_args.seed)
    splits = load_splits(args, training_args.seed)
    tokenizer, model = _load_checkpoint(model_args) if model_args.model_name_or_path else _new_model(args, splits)
    bounds = (args.max_source_length, args.max_target_length)
    tokenized, counts = tokenize_splits(splits, tokenizer, *bounds, model.config.decoder_start_token_id)
    trainer = _make_trainer(args, training_args, model_args, model, tokenizer, tokenized)
    sizes = _sizes(trainer.model)
    logger.info(f"{sizes['num_parameters']:,} parameters, {sizes['num_trainable_parameters']:,} of them trained.")

    before, _ = _measure(trainer, tokenized["test"], splits["test"], "before training")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    train_seconds = time.perf_counter() - started
    if isinstance(tokenized["train"], IterableDataset):
        log_cut_rows("train", counts["train"], *bounds)
    after, predictions = _measure(trainer, tokenized["test"], splits["test"], "after training")

    results = {
        "model": model_args.model_name_or_path or args.preset,
        **sizes,
        "vocab_size": len(tokenizer),
        "before": before,
        "after": after,
        "validation": validation_losses(trainer.state.log_history),
        "train_steps": trainer.state.global_step,
        "train_seconds": round(train_seconds, 1),
        "rows": {split: dict(count) for split, count in counts.items()},
        "device": str(trainer.args.device),
        "versions": versions(),
        "samples": predictions[:3],
    }
    _save(trainer, results, predictions)
    return results


def _sizes(model):
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"num_parameters": model.num_parameters(), "num_trainable_parameters": trained}


def _new_model(args, splits):
    """A tokenizer trained on the training split, and random weights of the preset's size that fit it."""
    tokenizer = train_tokenizer(first_texts(splits["train"]), args.vocab_size, args.max_source_length)
    return tokenizer, EncDecSLMForConditionalGeneration(preset_config(args.preset, tokenizer))


def _load_checkpoint(model_args):
    name = model_args.model_name_or_path
    # Checkpoints of this family run on the code of this package; code that comes with a checkpoint is not run.
    options = {"revision": model_args.model_revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForSeq2SeqLM.from_pretrained(
            name,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
            **options,
        )
    except OSError as error:
        raise ValueError(
            f"`model_name_or_path` {name!r} could not be loaded ({first_line(error)}). Give a folder that "
            "`save_pretrained` wrote, or the name of a model on the Hub."
        ) from error
    return tokenizer, model


def _make_trainer(args, training_args, model_args, model, tokenizer, tokenized):
    training_args = copy.copy(training_args)
    training_args.predict_with_generate = True
    # The start token counts; without a bound, an untrained model would write on to its longest position.
    training_args.generation_max_length = args.max_target_length + 1
    if model_args.use_peft:
        model = _with_adapters(model, model_args)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
    )
    show_losses(trainer)
    return trainer


def _with_adapters(model, model_args):
    from peft import get_peft_model

    targets = model_args.lora_target_modules or list(LORA_TARGET_MODULES)
    model_args = replace(model_args, lora_target_modules=targets, lora_task_type="SEQ_2_SEQ_LM")
    return get_peft_model(model, get_peft_config(model_args))


def _measure(trainer, tokenized, texts, when):
    """Numbers on held-out rows, and what the model wrote for each of them."""
    logger.info(f"Writing for {len(tokenized)} held-out rows, {when}:")
    output = trainer.predict(tokenized)
    scores, rows = held_out_texts(trainer.processing_class, output.predictions, texts["source"], texts["target"])
    loss = round(float(output.metrics["test_loss"]), 4)
    return {"loss": loss, **scores, "rows": len(rows)}, rows


def _save(trainer, results, predictions):
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    write_run_files(folder, trainer.state.log_history, results, predictions)
    if not hasattr(trainer.model, "peft_config"):  # PEFT writes a card for its adapters itself
        write_file(folder / "README.md", model_card(folder.name, trainer.model.config, results).save)


def report(results: dict[str, Any], folder: str) -> str:
    """For a screen: the numbers before and after, three samples, and what size of model to expect them from.

    Args:
        results (`dict`): Of [`finetune`].
        folder (`str`): Where the run has saved them.
    """
    lines = ["", f"{'held-out rows':26} {'before':>9} {'after':>9}"]
    names = {
        "loss": "loss (nats per token)",
        "rougeL": "ROUGE-L (0 to 100)",
        "rougeL_other_rows": "  beside wrong references",
        "exact": "exact matches (%)",
    }
    for key, name in names.items():
        lines.append(f"{name:26} {results['before'][key]:9.2f} {results['after'][key]:9.2f}")
    for sample in results["samples"]:
        lines += ["", first_lines(sample["source"]), f"  reference: {sample['reference']}"]
        lines += [f"  model:     {sample['prediction']}"]
    lines += [
        "",
        f"{results['after']['rows']} held-out rows were written for. The model has "
        f"{results['num_parameters'] / 1e6:.1f}M parameters and was trained for {results['train_seconds']:.0f} s on "
        f"{results['rows']['train']['rows']:,} rows on {results['device']}.",
        f"Saved to {folder}: the model, results.json, predictions.jsonl and loss.png.",
    ]
    return "\n".join(lines)
