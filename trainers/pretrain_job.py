# SPDX-License-Identifier: Apache-2.0
"""Pre-train a text model by denoising documents, and measure the loss on held-out documents."""

import dataclasses
import itertools
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from ..checkpoints import find_source_folders, load_checkpoint, write_file
from ..modeling_encdec_slm import EncDecSLMForConditionalGeneration
from ..run_results import DataSource, ModelResults, RunResults
from .corpora import HELD_OUT, STANDARD_LIBRARY, CorpusDataset, Source, describe_sources, mix_documents
from .denoising import NUM_SENTINELS, OBJECTIVES, DataCollatorForDenoising, add_sentinel_tokens
from .jobs import (
    AFTER,
    BEFORE,
    before_training,
    count_trainable,
    describe_training,
    loss_metric,
    save_run,
    show_losses,
    train,
)
from .muon import OPTIMIZERS, build_optimizer
from .new_models import TOKENIZER_ROWS, preset_config, train_tokenizer
from .resuming import STATE_NAME, prepare_output_dir


logger = logging.getLogger(__name__)

KIND = "pre-training"
# Arguments and corpus of a run; a run that is continued must have the same.
CORPUS_NAME = "corpus.json"


@dataclass
class PretrainArguments:
    """Corpus, model and objective of a pre-training run.

    Args:
        sources (`list[str]`, *optional*, defaults to `["python"]`): Parts of the corpus, each as `NAME` or
            `NAME=WEIGHT`; see [`~encdec_slm.trainers.corpora.Source`].
        text_column (`str`, *optional*, defaults to `"text"`): Of Parquet files and data sets.
        model_name_or_path (`str`, *optional*): A model to train further, whose tokenizer has sentinel tokens. `None`
            builds a new model.
        preset (`str`, *optional*, defaults to `"26m"`): Size of a new model.
        vocab_size (`int`, *optional*, defaults to 8192): Upper bound for the tokenizer of a new model, without its
            sentinels.
        objective (`str`, *optional*, defaults to `"span"`): `"span"` for T5's span corruption, `"prefix"` for prefix
            language modeling, `"ul2"` for the mixture of UL2.
        max_length (`int`, *optional*, defaults to 512): Most tokens of a row, before it is denoised.
        optimizer (`str`, *optional*, defaults to `"adamw"`): Or `"muon"`, for the matrices of the layers.
        max_eval_samples (`int`, *optional*, defaults to 200): Pieces of held-out documents that are measured.
        attn_implementation (`str`, *optional*): Such as `"flash_attention_2"`. `None` means `"sdpa"`.

    Raises:
        ValueError: A value is out of its range.
    """

    sources: list[str] = field(
        default_factory=lambda: [STANDARD_LIBRARY], metadata={"help": "Files, folders or data sets, as NAME=WEIGHT."}
    )
    text_column: str = field(default="text", metadata={"help": "Text column of Parquet files and data sets."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model to train further."})
    preset: str = field(default="26m", metadata={"help": "Size of a new model."})
    vocab_size: int = field(default=8192, metadata={"help": "Upper bound for a newly trained tokenizer."})
    objective: str = field(default="span", metadata={"help": "span, prefix or ul2."})
    max_length: int = field(default=512, metadata={"help": "Most tokens of a row."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon."})
    max_eval_samples: int = field(default=200, metadata={"help": "Pieces of held-out documents that are measured."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as flash_attention_2."})

    def __post_init__(self):
        for name, values in (("objective", tuple(OBJECTIVES)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}.")
        if not self.sources:
            raise ValueError("`sources` is empty, but at least one file, folder or data set is required.")


def pretrain(args: PretrainArguments, training_args: Seq2SeqTrainingArguments) -> RunResults:
    """Pre-train a text model, and save it with its tokenizer and the results to `training_args.output_dir`.

    Args:
        args ([`PretrainArguments`]): Corpus, model and objective.
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): The run, with `max_steps`.
            `resume_from_checkpoint` is `"true"` for the last complete checkpoint in the output folder, or the path of
            a checkpoint; the run continues with the row that came next.

    Returns:
        [`~encdec_slm.run_results.RunResults`]: `"before training"` and `"after training"` with the loss on held-out
        documents, which are about 1 % of all.

    Raises:
        ValueError: The corpus cannot be read or is another one than that of the run to continue, or arguments do not
            fit.
    """
    _check_arguments(args, training_args)
    sources = [Source.parse(text) for text in args.sources]
    folders = [*find_source_folders(args.model_name_or_path), *(source.name for source in sources)]
    checkpoint = prepare_output_dir(training_args, KIND, [name for name in folders if Path(name).exists()])
    run = {**dataclasses.asdict(args), "sources": describe_sources(sources, args.text_column)}
    run |= {"seed": training_args.seed, "max_eval_samples": None, "attn_implementation": None}
    _check_same_run(run, checkpoint)
    set_seed(training_args.seed)
    model, tokenizer = _build_model(args, sources, training_args.seed)
    start_id = model.config.decoder_start_token_id
    collator = DataCollatorForDenoising(tokenizer, OBJECTIVES[args.objective], args.max_length, start_id)
    options = {"seed": training_args.seed, "text_column": args.text_column}
    # Fewer documents than for training, because they are a hundredth of those that are read.
    held_out = CorpusDataset(sources, args.max_length, HELD_OUT, shuffle_buffer=args.max_eval_samples, **options)
    held_out = list(itertools.islice(held_out, args.max_eval_samples))
    if not held_out:
        raise ValueError("The corpus has no held-out documents, since it is too small. Add more text to `sources`.")
    progress = CorpusProgress(training_args, checkpoint)
    options |= {"start_row": progress.num_rows, "global_batch_size": progress.global_batch_size}
    trainer = Seq2SeqTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=CorpusDataset(sources, args.max_length, num_epochs=None, **options),
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(build_optimizer(args.optimizer, model, training_args), None),
        callbacks=[progress],
    )
    show_losses(trainer)
    logger.info(f"{model.num_parameters():,} parameters, {count_trainable(model):,} of them are trained.")
    with before_training(trainer):
        before = loss_metric(trainer.evaluate()["eval_loss"])
    if trainer.is_world_process_zero():
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
        write_file(Path(training_args.output_dir) / CORPUS_NAME, json.dumps(run))
    train_seconds = _train(trainer, checkpoint)
    after = loss_metric(trainer.evaluate()["eval_loss"])
    num_parameters = model.num_parameters()
    results = RunResults(
        kind=KIND,
        task=f"{args.objective} denoising",
        models=[
            ModelResults(BEFORE, {"loss": before}, num_parameters),
            ModelResults(AFTER, {"loss": after}, num_parameters, train_seconds),
        ],
        saved_model=AFTER,
        dataset=DataSource(", ".join(source.name for source in sources), split="held-out"),
        base_model=args.model_name_or_path or args.preset,
        **describe_training(
            trainer, {}, max_length=args.max_length, objective=args.objective, optimizer=args.optimizer
        ),
    )
    generation_config = GenerationConfig.from_model_config(model.config)
    save_run(trainer, generation_config, results)
    return results


class CorpusProgress(TrainerCallback, ExportableState):
    """Count the rows that a run has learned from, and store their number in its checkpoints.

    Args:
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): Of the run.
        checkpoint (`str`, *optional*): That the run continues from, perhaps of another number of processes.
    """

    def __init__(self, training_args: Seq2SeqTrainingArguments, checkpoint: str | None = None):
        self.global_batch_size = training_args.train_batch_size * training_args.world_size
        self.rows_per_step = self.global_batch_size * training_args.gradient_accumulation_steps
        self.num_rows = 0
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_NAME))
            saved = state.stateful_callbacks.get(type(self).__name__, {"attributes": {}})["attributes"]
            self.num_rows = saved.get("num_rows", state.global_step * self.rows_per_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.num_rows += self.rows_per_step

    def state(self) -> dict[str, Any]:
        """Return what is stored."""
        return {"args": {}, "attributes": {"num_rows": self.num_rows}}


def _check_arguments(args, training_args):
    if training_args.max_steps <= 0:
        raise ValueError("`max_steps` is required, because the length of a corpus is not known before it is read.")
    # Each process reads the corpus and keeps its own rows; batches of different sizes cannot be sent.
    training_args.accelerator_config.dispatch_batches = False
    training_args.remove_unused_columns = False
    training_args.prediction_loss_only = True
    # The data set skips the rows of a continued run itself, which takes less time.
    training_args.ignore_data_skip = True
    if training_args.torch_compile:
        # Packs differ in shape. Without this, the model is also compiled for the shape of the first batch alone.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")


def _check_same_run(run, checkpoint):
    """Check that a run is continued with what it was started with."""
    if checkpoint is None or not (path := Path(checkpoint).parent / CORPUS_NAME).is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in run if run[name] != earlier.get(name, run[name])]:
        raise ValueError(
            f"The run in {str(path.parent)!r} was started with other {', '.join(changed)}, so it cannot be "
            f"continued at the same row. Restore them, or start a new run in another `output_dir` from its weights, "
            f"by `model_name_or_path`: {checkpoint}."
        )


def _train(trainer, checkpoint):
    """Train; if a source cannot be read, save a checkpoint before the error is raised."""
    try:
        return train(trainer, checkpoint)
    except ValueError as error:
        if trainer.state.global_step == 0 or trainer.args.save_strategy == "no":
            raise
        trainer._save_checkpoint(trainer.model, trial=None)
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        raise ValueError(f"{error} The run was saved to {folder}: continue it by `resume_from_checkpoint`.") from error


def _build_model(args, sources, seed):
    """Load a model, or build one with a tokenizer that is trained on the first documents."""
    if args.model_name_or_path is not None:
        model, tokenizer = load_checkpoint(args.model_name_or_path, attn_implementation=args.attn_implementation)
        add_sentinel_tokens(tokenizer)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        return model, tokenizer
    documents = itertools.islice(mix_documents(sources, seed, args.text_column), TOKENIZER_ROWS)
    tokenizer = train_tokenizer(documents, args.vocab_size, args.max_length + NUM_SENTINELS)
    add_sentinel_tokens(tokenizer)
    model = EncDecSLMForConditionalGeneration(preset_config(args.preset, tokenizer))
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    return model, tokenizer


__all__ = ["PretrainArguments", "pretrain"]
