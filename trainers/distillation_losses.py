# SPDX-License-Identifier: Apache-2.0
"""Distillation objective over whole next-token distributions, computed from hidden states in chunks of positions.

N positions, D width, V vocabulary. No tensor of shape (N, V) is larger than one chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .output_heads import OutputHead


# Size of the float32 logits of one chunk, per model; the objective holds several tensors of this size. Accelerators
# need larger chunks because each operation has a fixed cost.
LOGITS_BUDGET_BYTES = 2**25
ACCELERATOR_LOGITS_BUDGET_BYTES = 2**28
LOWEST_LOG_PROBABILITY = -1e4


class Objective(NamedTuple):
    """Result of [`distillation_objective`].

    Args:
        loss (`torch.Tensor` of shape `()`): `kd_weight * sum(divergence) + ce_weight * sum(smoothed cross_entropy)`.
        divergence (`torch.Tensor` of shape `(num_positions,)`): In nats, without `temperature**2` and `kd_weight`.
        cross_entropy (`torch.Tensor` of shape `(num_positions,)`): In nats, without label smoothing.
        entropy (`torch.Tensor` of shape `(num_positions,)`): Entropy of the student, in nats.
        agreement (`torch.Tensor` of shape `(num_positions,)`): 1 if the most probable token of both models is the
            same, else 0.
        kept_mass (`torch.Tensor` of shape `(num_positions,)`): Probability that the teacher gives to the tokens of a
            trimmed vocabulary; 1 without `teacher_token_ids`.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    agreement: torch.Tensor
    kept_mass: torch.Tensor


class ObjectiveSettings(NamedTuple):
    """Weights and kind of [`distillation_objective`].

    Args:
        kd_weight (`float` or `torch.Tensor` of shape `()`): Weight of the summed divergence, with `temperature**2`.
        ce_weight (`float` or `torch.Tensor` of shape `()`): Weight of the summed cross-entropy.
        beta (`float`): 0 is the forward KL divergence, 1 the reverse one, between them the generalized JSD.
        temperature (`float`): Divides both logits in the divergence; > 0.
        label_smoothing (`float`): Share of the label's probability that goes to all tokens; cross-entropy only.
        num_common_tokens (`int`, *optional*): Token ids below it are the same tokens for both models and are
            compared. Each distribution is restricted to them and renormalized. Not used by teachers that are no
            tensors.
        teacher_token_ids (`torch.LongTensor` of shape `(num_common_tokens,)`, *optional*): The teacher's ids of these
            tokens, for a student with a trimmed vocabulary. `None` if the ids are the same.
        logits_budget_bytes (`int`, *optional*): Size of one chunk of float32 logits of one model. `None` means 32 MiB
            on a CPU and 256 MiB on an accelerator.
    """

    kd_weight: float | torch.Tensor
    ce_weight: float | torch.Tensor
    beta: float
    temperature: float
    label_smoothing: float
    num_common_tokens: int | None
    teacher_token_ids: torch.Tensor | None = None
    logits_budget_bytes: int | None = None


def token_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """Compute the divergence between the next-token distributions of student and teacher at each position, in nats.

    Args:
        student_logits (`torch.FloatTensor` of shape `(..., vocab_size)`): float32.
        teacher_logits (`torch.FloatTensor` of the same shape): Receives no gradient.
        beta (`float`, *optional*, defaults to 0.0): 0 is KL(teacher || student), 1 is KL(student || teacher). Between
            them, with the mixture `m = (1 - beta) * student + beta * teacher`, it is
            `beta * KL(teacher || m) + (1 - beta) * KL(student || m)`, as in TRL (arXiv 2306.13649).
        temperature (`float`, *optional*, defaults to 1.0): Divides both logits; > 0.

    Returns:
        `torch.Tensor` of shape `(...)`: Not scaled by `temperature**2`. A teacher logit of -inf counts as a
        probability of exp(-10000), so that the reverse divergence stays finite.

    Raises:
        ValueError: The shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` and `teacher_logits` must have the same shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}. Use a teacher with the student's tokenizer."
        )
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    log_teacher = _teacher_log_probs(teacher_logits / temperature)
    return divergence_of_log_probs(log_student, log_student.exp(), log_teacher, beta)[0]


def _teacher_log_probs(logits):
    """Clamp -inf log-probabilities so that excluded tokens contribute 0 instead of NaN."""
    return F.log_softmax(logits, dim=-1).clamp_(min=LOWEST_LOG_PROBABILITY)


def divergence_of_log_probs(log_student, student, log_teacher, beta):
    """Return the divergence of shape (N,) and its gradient for the student's logits, of shape (N, V)."""
    if beta == 0.0:
        teacher = log_teacher.exp()
        return torch.linalg.vecdot(teacher, log_teacher - log_student), student - teacher
    log_mixture = log_teacher
    if beta < 1.0:
        log_mixture = torch.logaddexp(log_student + math.log(1 - beta), log_teacher + math.log(beta))
    log_ratio = log_student - log_mixture
    student_part = torch.linalg.vecdot(student, log_ratio)
    gradient = student * (log_ratio - student_part[..., None])
    if beta == 1.0:
        return student_part, gradient
    teacher_part = torch.linalg.vecdot(log_teacher.exp(), log_teacher - log_mixture)
    return beta * teacher_part + (1 - beta) * student_part, (1 - beta) * gradient


def distillation_objective(
    student_hidden: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden: torch.Tensor | None,
    teacher_head: OutputHead | None,
    labels: torch.Tensor,
    settings: ObjectiveSettings,
) -> Objective:
    """Compute the weighted sum of divergence and cross-entropy over positions.

    Gradients are computed together with the loss, chunk by chunk, so that no logits are kept or computed twice.

    Args:
        student_hidden (`torch.Tensor` of shape `(num_positions, student_width)`): Inputs of `student_head`.
        student_head ([`OutputHead`]): Head of the student; its weight and bias receive gradients.
        teacher_hidden (`torch.Tensor` of shape `(num_positions, teacher_width)`, *optional*): Inputs of
            `teacher_head`; or a [`~encdec_slm.trainers.cached_labels.CachedLabels`] or
            [`~encdec_slm.trainers.token_alignment.AlignedTeacher`], which compare themselves with the student. `None`
            computes the cross-entropy alone; what compares the models is 0.
        teacher_head ([`OutputHead`], *optional*): Head of the teacher for a tensor.
        labels (`torch.LongTensor` of shape `(num_positions,)`): Token that each position predicts.
        settings ([`ObjectiveSettings`]): Weights and kind of divergence.

    Returns:
        [`Objective`]: Without positions the loss is 0, still differentiable.
    """
    weight, bias = student_head.weight, student_head.bias
    student_hidden, student_head = to_autocast_dtype(student_hidden, student_head)
    if teacher_head is not None:
        teacher_hidden, teacher_head = to_autocast_dtype(teacher_hidden, teacher_head)
    inputs = (student_hidden, weight, bias)
    if not torch.is_grad_enabled():
        inputs = (None if value is None else value.detach() for value in inputs)
    return Objective(*_ChunkedObjective.apply(*inputs, student_head, teacher_hidden, teacher_head, labels, settings))


def to_autocast_dtype(hidden: torch.Tensor, head: OutputHead) -> tuple[torch.Tensor, OutputHead]:
    """Cast hidden states and head once to the precision that autocast would use for their product."""
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), head.cast(dtype)


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, teacher_hidden, teacher_head, labels, settings):
        loss = torch.zeros((), device=hidden.device)
        parts = [torch.zeros(len(hidden), device=hidden.device) for _ in range(5)]
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        size = _chunk_size(hidden, head, teacher_hidden, teacher_head, settings)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            teacher = None if teacher_hidden is None else teacher_hidden[chunk]
            teacher = teacher if teacher_head is None else teacher_head.logits(teacher)
            logits = head.logits(hidden[chunk])
            chunk_loss, chunk_parts, gradient = _chunk_objective(logits, teacher, labels[chunk], settings)
            loss += chunk_loss
            for part, chunk_part in zip(parts, chunk_parts, strict=True):
                part[chunk] = chunk_part
            if any(ctx.needs_input_grad):
                gradients.add(chunk, head.projection_gradient(gradient, logits), hidden[chunk], head)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _chunk_size(hidden, head, teacher_hidden, teacher_head, settings):
    """Number of positions whose logits fit the budget."""
    vocab_size = head.vocab_size(hidden)
    if teacher_head is not None:
        vocab_size = max(vocab_size, teacher_head.vocab_size(teacher_hidden))
    elif teacher_hidden is not None:
        vocab_size = max(vocab_size, teacher_hidden.num_scores)
    budget = settings.logits_budget_bytes
    if budget is None:
        budget = LOGITS_BUDGET_BYTES if hidden.device.type == "cpu" else ACCELERATOR_LOGITS_BUDGET_BYTES
    return max(1, budget // (4 * vocab_size))


class _Gradients:
    """Sums over chunks of the gradients for hidden states, weight and bias, where they are needed."""

    def __init__(self, hidden, weight, bias, is_needed):
        self.hidden = torch.zeros_like(hidden) if is_needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if is_needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if is_needed[2] else None

    def add(self, chunk, gradient, hidden, head):
        """Add the gradients of a chunk, from the gradient for its projection, of shape (N, V)."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = gradient if head.weight is None else gradient @ head.weight.to(hidden.dtype)
        if self.weight is None:
            return
        if hidden.dtype == torch.float32:
            self.weight.addmm_(gradient.mT, hidden)
        else:
            self.weight += gradient.mT @ hidden


def _chunk_objective(logits, teacher, labels, settings):
    """Return the loss, its parts of shape (N,), and its gradient for the student's float32 logits, of shape (N, V)."""
    log_student = F.log_softmax(logits, dim=-1)
    student = log_student.exp()
    smoothing, vocab_size = settings.label_smoothing, logits.shape[-1]
    cross_entropy = -log_student.gather(-1, labels[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(student, log_student)
    divergence = agreement = kept_mass = torch.zeros_like(cross_entropy)
    loss = settings.ce_weight * (1 - smoothing) * cross_entropy.sum()
    gradient = settings.ce_weight * student
    label_gradient = torch.as_tensor(
        settings.ce_weight * (smoothing - 1), dtype=gradient.dtype, device=gradient.device
    )
    gradient.scatter_add_(-1, labels[:, None], label_gradient.expand(len(labels), 1))
    if smoothing:
        loss -= settings.ce_weight * smoothing * log_student.mean(-1).sum()
        gradient -= settings.ce_weight * smoothing / vocab_size
    if teacher is not None:
        if isinstance(teacher, torch.Tensor):
            teacher_logits, kept_mass = _restrict(teacher, settings)
            divergence, agreement, kd_gradient = _compare(logits, log_student, student, teacher_logits, settings)
        else:
            divergence, agreement, kept_mass, kd_gradient = teacher.compare(
                logits, log_student, student, settings.beta
            )
        loss += settings.kd_weight * divergence.sum()
        kd_gradient.mul_(settings.kd_weight / settings.temperature)
        gradient[:, : settings.num_common_tokens].add_(kd_gradient)
    return loss, (divergence, cross_entropy, entropy, agreement, kept_mass), gradient


def _restrict(teacher_logits, settings):
    """Return the teacher's logits of the common tokens, and the probability of these, of shape (N,)."""
    if settings.teacher_token_ids is None:
        return teacher_logits[:, : settings.num_common_tokens], torch.ones_like(teacher_logits[:, 0])
    kept_logits = teacher_logits[:, settings.teacher_token_ids]
    return kept_logits, (kept_logits.logsumexp(-1) - teacher_logits.logsumexp(-1)).exp()


def _compare(logits, log_student, student, teacher_logits, settings):
    """Return divergence and agreement on the common tokens, of shape (N,), and the gradient for the logits."""
    num_tokens, temperature = settings.num_common_tokens, settings.temperature
    is_whole = logits.shape[-1] == num_tokens
    logits = logits[:, :num_tokens]
    agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).float()
    if temperature != 1.0 or not is_whole:
        log_student = F.log_softmax(logits / temperature, dim=-1)
        student = log_student.exp()
    if temperature != 1.0:
        teacher_logits = teacher_logits / temperature
    divergence, gradient = divergence_of_log_probs(
        log_student, student, _teacher_log_probs(teacher_logits), settings.beta
    )
    return divergence, agreement, gradient


# Sums over the tokens of rows, for means over batches of any size

# Columns of the sums.
COMPARISON_SUMS = ("kd_loss", "entropy", "teacher_agreement", "kept_mass", "num_target_tokens")
ROW_SUMS = (*COMPARISON_SUMS, "ce_loss", "num_gold_tokens")


def add_to_rows(row_sums: torch.Tensor, rows: torch.Tensor, *parts: torch.Tensor) -> None:
    """Add values of positions, of shape `(num_positions,)`, and their number to the sums of their rows."""
    row_sums.index_add_(0, rows, torch.stack((*parts, torch.ones_like(parts[0])), 1))


def reduce_row_sums(row_sums: torch.Tensor, kd_ratio: float, kd_temperature: float) -> dict[str, float]:
    """Return means per token from `ROW_SUMS` of shape `(num_rows, 7)`, and the loss that they make."""
    sums = dict(zip(ROW_SUMS, row_sums.sum(0).tolist(), strict=True))
    means = {"loss": 0.0}
    if num_tokens := sums["num_target_tokens"]:
        means |= {name: sums[name] / num_tokens for name in COMPARISON_SUMS[:-1]}
        means["loss"] += kd_ratio * kd_temperature**2 * means["kd_loss"]
    if num_tokens := sums["num_gold_tokens"]:
        means["ce_loss"] = sums["ce_loss"] / num_tokens
        means["loss"] += (1 - kd_ratio) * means["ce_loss"]
    return means


__all__ = ["Objective", "ObjectiveSettings", "distillation_objective", "token_divergence"]
