# SPDX-License-Identifier: Apache-2.0
"""Settings of a distillation run: TRL's, and what an encoder-decoder student adds to them."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import DistillationConfig


@dataclass
class Seq2SeqDistillationConfig(DistillationConfig):
    """TRL's [`~trl.DistillationConfig`] with a cross-entropy part and with targets from elsewhere than the student.

    The loss is `kd_ratio * kd_temperature**2 * divergence + (1 - kd_ratio) * cross_entropy`, in nats per target token.
    With the defaults it is TRL's: reverse KL divergence on texts that the student writes. `bf16` defaults to
    `True` where there is a GPU for it.

    Args:
        kd_ratio (`float`, *optional*, defaults to 1.0): Share of the divergence in the loss, in [0, 1]. The rest is
            the cross-entropy on the gold target: the row's, or in batches of `seq_kd` the teacher's text. With 0 the
            teacher is only run to write (`seq_kd`) and to evaluate, and the student does not write (`lmbda` is 0).
        kd_temperature (`float`, *optional*, defaults to 1.0): Softens both distributions of the divergence, which is
            scaled by its square; > 0. TRL's `temperature` is that of sampling alone here.
        lmbda (`float`, *optional*, defaults to 1.0): Probability that a batch has targets that the student writes, in
            [0, 1]. The other batches have those of the data, or of `seq_kd`.
        seq_kd (`bool`, *optional*, defaults to `False`): Let the teacher write the targets that the student does not;
            those of the data are then not read. Both write with `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty` and `generation_kwargs`, up to `max_completion_length` tokens.
        max_source_length (`int`, *optional*): Longest source, in tokens of the student; what is cut is counted and
            logged. `None` cuts nothing, and of images nothing is cut. Targets are bounded by `max_completion_length`,
            likewise.
        predict_with_generate (`bool`, *optional*, defaults to `False`): In evaluation, write a text for each row, by
            greedy search with `repetition_penalty` and `generation_kwargs`, for `compute_metrics`.

    Raises:
        ValueError: A value is out of its range, or asks for what an encoder-decoder cannot do.
    """

    kd_ratio: float = field(default=1.0, metadata={"help": "Share of the divergence, against cross-entropy."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Softens both distributions in the loss."})
    lmbda: float = field(default=1.0, metadata={"help": "Probability that the student writes a batch's targets."})
    seq_kd: bool = field(default=False, metadata={"help": "Let the teacher write the other batches' targets."})
    max_source_length: int | None = field(default=None, metadata={"help": "Longest source, in tokens."})
    predict_with_generate: bool = field(default=False, metadata={"help": "Write texts in evaluation."})

    def __post_init__(self):
        # TRL 1.16 sets the name that transformers 5.23 warns of; the new one says the same.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        # TRL's default is bf16 on every machine, which one without a GPU refuses.
        if self.bf16 is None and (self.use_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False
        super().__post_init__()
        for name in ("kd_ratio", "lmbda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it is a share. Set it from 0 to 1.")
        for name in ("kd_temperature", "temperature"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but logits are divided by it. Set it above 0.")
        for name in ("max_source_length", "max_completion_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but a text has at least one token. Set it to 1 or more."
                )
        if self.max_completion_length is None:
            raise ValueError("`max_completion_length` is `None`, but texts that are written need a bound. Set it.")
        if self.use_vllm:
            raise ValueError("`use_vllm` is true, but vLLM runs no encoder-decoder student. Leave it out.")


__all__ = ["Seq2SeqDistillationConfig"]
