# SPDX-License-Identifier: Apache-2.0
"""Everything private of TRL that distillation into an encoder-decoder relies on, in one place.

TRL 1.16 is supported, and later 1.x as long as tests/test_trl_hooks.py passes: it has a test for each of the hooks.
"""

import importlib
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import IterableDataset
from torch.utils.data import SequentialSampler
from transformers import GenerationConfig, Trainer
from transformers.utils import is_rich_available
from trl import DistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models import prepare_deepspeed
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, print_prompt_completions_sample

from .distillation_data import ENCODED_COLUMNS, padded
from .distillation_images import ROW_COLUMNS, joined


class EpochSampler(RepeatSampler):
    """TRL's sampler, in an order that the number of the epoch decides: a resumed run finds the rows it left."""

    def set_epoch(self, epoch):
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class EncoderDecoderHooks(DistillationTrainer):
    """TRL's trainer with its row order, text generation and batches made for an encoder-decoder student.

    Of TRL remain the loop that writes texts once for all batches of an optimizer step, shuffles and splits them, the
    lengths that it logs, the routing through DDP, FSDP and DeepSpeed, PEFT and the logging of metrics.
    """

    def make_batch(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Tensors of a generation batch, whose first axis is the row, and 0-dimensional counts for all processes."""
        raise NotImplementedError

    def _generate_and_score_completions(self, inputs):
        return self.make_batch(inputs)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*ENCODED_COLUMNS, *ROW_COLUMNS]

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if len(sampler) == 0:
            raise ValueError(
                f"The training data has {sampler.num_samples} rows, but an optimizer step takes {sampler.batch_size} "
                "(batch size x accumulation steps x processes). Lower `per_device_train_batch_size` or "
                "`gradient_accumulation_steps`, or add rows."
            )
        return EpochSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )

    def _get_eval_sampler(self, eval_dataset):
        # TRL's own shuffles; predictions are to be in the order of the rows.
        return SequentialSampler(eval_dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        """As of the Trainer: in the order of the rows, which TRL shuffles."""
        rows = self.eval_dataset.get(eval_dataset) if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(self.eval_dataset if rows is None else rows, IterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        self.accelerator.dataloader_config.dispatch_batches = False  # rows are lists, which cannot be sent around
        return Trainer.get_eval_dataloader(self, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As of the Trainer."""
        if isinstance(test_dataset, IterableDataset):
            self.accelerator.dataloader_config.dispatch_batches = False
        return super().get_test_dataloader(test_dataset)

    def _tokenize_prompts(self, prompts):
        if isinstance(prompts[0], tuple):
            prompts, images = map(list, zip(*prompts, strict=True))
            return prompts, images, {}
        return prompts, None, {}  # rows hold token ids already

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        return self.write(self.model_wrapped, prompt_ids, self.generation_config, images)

    def student_texts(self, source_ids: list[list[int]], images: list[dict] | None = None) -> list[list[int]]:
        """Token ids that the student samples for each source, the lengths of which are logged.

        `images` has for each source the inputs that its images are to the student.
        """
        prompts = source_ids if images is None else list(zip(source_ids, images, strict=True))
        _, completion_ids, *_ = self._generate(prompts)
        return completion_ids

    def write(
        self,
        model,
        prompt_ids: list[list[int]],
        generation_config: GenerationConfig,
        images: list[dict] | None = None,
    ) -> list[list[int]]:
        """Token ids that a model writes after each prompt, up to the end-of-text token, which they include.

        The model is in eval mode while it writes, so that nothing is dropped out and keys and values are cached.
        `images` has for each prompt the inputs that its images are to the model.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        is_decoder_only = not unwrapped.config.is_encoder_decoder
        pad_token_id, multiple = generation_config.pad_token_id, self.pad_to_multiple_of
        ids, mask = padded(prompt_ids, pad_token_id, multiple, left=is_decoder_only)
        inputs = Trainer._prepare_inputs(self, {"input_ids": ids, "attention_mask": mask, **joined(images or ())})
        was_training = unwrapped.training
        unwrapped.eval()
        try:
            with (
                _without_warnings_of_names(),
                unwrap_model_for_generation(
                    model,
                    self.accelerator,
                    gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                    gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                ) as writer,
                torch.no_grad(),
                self.accelerator.autocast(),
                self._dist.summon_full_params(model, recurse=False),
            ):
                # Processes that share a model's shards are to make equally many steps; transformers sees FSDP1 only.
                synced = True if self.is_fsdp_enabled else None
                written = writer.generate(**inputs, generation_config=generation_config, synced_gpus=synced)
        finally:
            unwrapped.train(was_training)
        # An encoder-decoder begins with its start token, a decoder-only model with the prompt.
        begin = ids.shape[1] if is_decoder_only else 1
        return [_until_end(row, generation_config.eos_token_id) for row in written[:, begin:].tolist()]

    def image_inputs(self, images: list[dict] | None) -> dict[str, torch.Tensor]:
        """Inputs of all images of a batch, from those of each row, on the model's device; `None` has none."""
        return self._prepare_input(joined(images or ()))

    def count_tokens(self, mode: str, num_tokens: int) -> None:
        """Adds tokens of a batch whose targets the student did not write to those seen; TRL counts the others."""
        if mode == "train":
            counted = torch.tensor(num_tokens, device=self.accelerator.device)
            self.state.num_input_tokens_seen += self.accelerator.gather(counted).sum().item()
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]

    def log_metric(self, mode: str, name: str, value: float) -> None:
        """Adds a value to those of which the mean is logged next; `mode` is `"train"` or `"eval"`."""
        self._metrics[mode][name].append(value)

    def prepared_teacher(self, teacher):
        """The teacher as accelerate or DeepSpeed wraps it for inference; nothing of it is trained."""
        teacher.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def routed(self, wrapped, method, *args, **kwargs):
        """What `method(unwrapped model, ...)` returns, called from within the forward of the wrapped model."""
        unwrapped = self.accelerator.unwrap_model(wrapped)
        # The redirection replaces the forward that accelerate has put autocast around.
        with self.accelerator.autocast():
            return self._forward_redirection(wrapped, unwrapped, method, unwrapped, *args, **kwargs)

    def log_texts(self, sources: list[str], student: list[str], teacher: list[str], gold: list[str]) -> None:
        """Prints texts side by side and keeps them as TRL keeps completions: a Parquet file, Trackio, W&B."""
        if not self.accelerator.is_main_process:
            return
        step = self.state.global_step
        if is_rich_available():
            others = {"Teacher": teacher, "Gold": gold}
            print_prompt_completions_sample(sources, student, {}, None, step, None, extra=others)
        import pandas

        columns = {"prompt": sources, "completion": student, "teacher": teacher, "gold": gold}
        table = pandas.DataFrame({"step": [step] * len(sources), **columns})
        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"completions_{step:05d}.parquet")
        for name in {"trackio", "wandb"} & set(self.args.report_to):
            backend = importlib.import_module(name)
            if name == "trackio" or backend.run is not None:
                backend.log({"completions": backend.Table(dataframe=table)})


@contextmanager
def _without_warnings_of_names():
    """TRL 1.16 speaks of gradient checkpointing, names that transformers 5.23 warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
        yield


def _until_end(ids, eos_token_ids):
    ends = [position for position, id in enumerate(ids) if id in eos_token_ids]
    return ids[: ends[0] + 1] if ends else ids


def kernel_divergence(student_hidden, student_head, teacher_hidden, teacher_head, settings):
    """Divergence and student entropy per position by TRL's kernel, which keeps no logits; made for CUDA.

    Its entropy is that of the softened student: one kernel has one temperature.
    """
    common = slice(settings.num_common_tokens)
    return ChunkedDivergenceFunction.apply(
        student_hidden,
        student_head.weight[common],
        None if student_head.bias is None else student_head.bias[common],
        teacher_hidden,
        teacher_head.weight[common],
        None if teacher_head.bias is None else teacher_head.bias[common],
        settings.beta,
        settings.temperature,
        student_head.scale,
        student_head.softcap,
        teacher_head.scale,
        teacher_head.softcap,
    )


__all__ = ["EncoderDecoderHooks"]
