# SPDX-License-Identifier: Apache-2.0
"""Fine-tune an encoder-decoder on rows of source and target text, and measure held-out rows before and after."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainingArguments, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..checkpoints import find_source_folders, has_vision, load_checkpoint
from ..run_results import ModelResults, RunResults
from .jobs import (
    AFTER,
    BEFORE,
    before_training,
    build_trainer,
    decode,
    describe_training,
    loss_metric,
    predict,
    save_run,
    text_metrics,
    train,
)
from .muon import build_optimizer, check_optimizer
from .new_models import build_text_model
from .packing import DataCollatorWithPacking
from .resuming import prepare_output_dir
from .row_encoding import RowEncoder, encode_rows
from .seq2seq_data import DataArguments, load_splits


logger = logging.getLogger(__name__)

# Modules that LoRA adapts by default: all projections of self-attention, cross-attention and MLP in both stacks.
LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class FinetuneArguments(DataArguments):
    """Data and size of a fine-tuning run.

    Args: those of [`~encdec_slm.trainers.seq2seq_data.DataArguments`], and
        preset (`str`, *optional*, defaults to `"tiny"`): Size of a new model, without `model_name_or_path`; see
            [`~encdec_slm.configuration.list_presets`].
        architecture (`str`, *optional*, defaults to `"encdec_slm"`): Of a new model; `"t5"` is for llama.cpp.
        vocab_size (`int`, *optional*, defaults to 4096): Upper bound for the tokenizer of a new model.
        max_source_length (`int`, *optional*, defaults to 256): In tokens; longer sources are truncated and counted.
        max_target_length (`int`, *optional*, defaults to 48): In tokens, likewise; also the longest completion of the
            saved model.
        optimizer (`str`, *optional*, defaults to `"adamw"`): Or `"muon"`, for the matrices of the layers; see
            [`~encdec_slm.trainers.muon.MuonWithAdamW`].
        packing (`bool`, *optional*, defaults to `False`): Pack the rows of a training batch into fewer sequences
            instead of padding them, by [`~encdec_slm.trainers.packing.DataCollatorWithPacking`].
        packed_source_length (`int`, *optional*): Most source tokens of such a sequence. `None` means the longest
            source of a batch.
        packed_target_length (`int`, *optional*): Most target tokens, likewise.

    Raises:
        ValueError: Packs are shorter than the rows may be, or `packing` is not set.
    """

    preset: str = field(default="tiny", metadata={"help": "Size of a new model."})
    architecture: str = field(default="encdec_slm", metadata={"help": "Of a new model: encdec_slm or t5."})
    vocab_size: int = field(default=4096, metadata={"help": "Upper bound for a newly trained tokenizer."})
    max_source_length: int = field(default=256, metadata={"help": "Longest source, in tokens."})
    max_target_length: int = field(default=48, metadata={"help": "Longest target, in tokens."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon."})
    packing: bool = field(default=False, metadata={"help": "Pack rows of a batch into fewer sequences."})
    packed_source_length: int | None = field(default=None, metadata={"help": "Most source tokens of a pack."})
    packed_target_length: int | None = field(default=None, metadata={"help": "Most target tokens of a pack."})

    def __post_init__(self):
        super().__post_init__()
        check_optimizer(self.optimizer)
        for kind in ("source", "target"):
            packed_length, length = getattr(self, f"packed_{kind}_length"), getattr(self, f"max_{kind}_length")
            if packed_length is not None and not self.packing:
                raise ValueError(f"`packed_{kind}_length` has no effect without `packing`. Set `packing` to true.")
            if packed_length is not None and packed_length < length:
                raise ValueError(
                    f"`packed_{kind}_length` is {packed_length}, but rows may have up to `max_{kind}_length` = "
                    f"{length} tokens. Raise the first, or lower the second."
                )


def finetune(
    args: FinetuneArguments, training_args: Seq2SeqTrainingArguments, model_args: ModelConfig | None = None
) -> RunResults:
    """Fine-tune a text model, and save it with its tokenizer and the results to `training_args.output_dir`.

    Args:
        args ([`FinetuneArguments`]): Data and size.
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): The run. `resume_from_checkpoint` is `"true"` for
            the last complete checkpoint in the output folder, or the path of a checkpoint.
        model_args ([`~trl.ModelConfig`], *optional*): A checkpoint to start from, and LoRA. `None` builds a new model
            of `args.preset`. A checkpoint that is a LoRA adapter is trained further.

    Returns:
        [`~encdec_slm.run_results.RunResults`]: `"before training"` and `"after training"` with loss, ROUGE-L and exact
        matches on held-out rows.

    Raises:
        ValueError: Data, model, sizes or output folder do not fit.
        TypeError: A `source` or `target` is not text.
    """
    model_args = ModelConfig() if model_args is None else model_args
    name = model_args.model_name_or_path
    _check_arguments(args, training_args, model_args)
    sources = [*find_source_folders(name), args.dataset_name]
    checkpoint = prepare_output_dir(training_args, "fine-tuning", sources, args.data_files)
    set_seed(training_args.seed)

    splits = load_splits(args, training_args.seed)
    if name is None:
        model, tokenizer = build_text_model(
            args.preset, splits["train"], args.vocab_size, args.max_source_length, args.architecture
        )
    else:
        model, tokenizer = load_model(model_args)
    start_id = model.config.decoder_start_token_id
    encoder = RowEncoder(tokenizer, args.max_source_length, args.max_target_length, start_id)
    counts = {split: Counter() for split in splits}
    encoded = {split: encode_rows(rows, encoder, f"{split} rows", counts[split]) for split, rows in splits.items()}
    packing_collator = None
    if args.packing:
        limits = args.packed_source_length, args.packed_target_length
        packing_collator = DataCollatorWithPacking(tokenizer, start_id, *limits)
    trainer = build_trainer(
        model,
        training_args,
        args.max_target_length,
        inherited_from=name,
        packing_collator=packing_collator,
        data_collator=encoder.collate,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        optimizers=(build_optimizer(args.optimizer, model, training_args), None),
    )

    with before_training(trainer):
        before, _ = _measure(trainer, encoded["test"], splits["test"])
    train_seconds = train(trainer, checkpoint)
    after, completions = _measure(trainer, encoded["test"], splits["test"])

    predictions = [
        {"source": row["source"], "reference": row["target"], "prediction": completion}
        for row, completion in zip(splits["test"], completions, strict=True)
    ]
    num_parameters = model.num_parameters()
    results = RunResults(
        kind="fine-tuning",
        task="docstrings" if args.is_docstring_task else "text",
        models=[
            ModelResults(BEFORE, before, num_parameters),
            ModelResults(AFTER, after, num_parameters, train_seconds),
        ],
        saved_model=AFTER,
        dataset=args.describe_source(args.test_file or args.train_file or "docstrings"),
        num_cut_rows={f"train {kind}s": counts["train"][kind] for kind in ("source", "target")},
        base_model=name or args.preset,
        samples=predictions[:3],
        **describe_training(
            trainer,
            splits,
            max_source_length=args.max_source_length,
            max_target_length=args.max_target_length,
            optimizer=args.optimizer,
        ),
    )
    save_run(trainer, trainer.args.generation_config, results, predictions)
    return results


def _check_arguments(args, training_args, model_args):
    if args.dataset_streaming and training_args.max_steps <= 0:
        raise ValueError(
            "`dataset_streaming` is true and `max_steps` is not set, but the length of a stream is unknown. Set "
            "`max_steps` to the number of optimizer steps."
        )
    if model_args.use_peft and not model_args.model_name_or_path:
        raise ValueError(
            "`use_peft` is true and `model_name_or_path` is not set, but adapters need trained weights. Set it to a "
            "checkpoint folder or a model on the Hub."
        )


def load_model(model_args: ModelConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a text model to train, with new adapters if `use_peft` is true, and its tokenizer.

    Args:
        model_args ([`~trl.ModelConfig`]): A checkpoint that is an adapter is continued, with and without `use_peft`.

    Raises:
        ValueError: The checkpoint cannot be loaded, has no tokenizer or reads images.
    """
    name = model_args.model_name_or_path
    quantization_config = get_quantization_config(model_args)
    model, tokenizer = load_checkpoint(
        name,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        adapter="train",
        attn_implementation=model_args.attn_implementation,
        **({} if quantization_config is None else {"quantization_config": quantization_config}),
    )
    if tokenizer is None:
        raise ValueError(f"{name!r} has no tokenizer. Save the tokenizer of the model into the same folder.")
    if has_vision(model):
        raise ValueError(f"{name!r} is a vision-text model, but rows are text. Fine-tune it by `--task vision`.")
    if isinstance(model, PeftModel):
        logger.info(f"The adapter of {name} is trained further; `lora_*` settings are those of the adapter.")
    elif model_args.use_peft:
        targets = model_args.lora_target_modules or list(LORA_TARGET_MODULES)
        config = replace(model_args, lora_target_modules=targets, lora_task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, get_peft_config(config))
    return model, tokenizer


def _measure(trainer, encoded, rows):
    """Return loss and scores of held-out rows, and the completions."""
    output = predict(trainer, encoded)
    completions = decode(trainer.processing_class, output.predictions, len(rows))
    return {"loss": loss_metric(output.metrics["test_loss"]), **text_metrics(completions, rows["target"])}, completions
