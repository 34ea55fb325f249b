# SPDX-License-Identifier: Apache-2.0
"""The distillation objective over whole next-token distributions, computed from hidden states in chunks of positions.

N positions, D width, V vocabulary. No tensor of `N x V` exists beyond one chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .output_heads import OutputHead


# One chunk of float32 logits, per model; at its peak the objective holds several tensors of this size.
LOGITS_BUDGET_BYTES = 2**25
LOWEST_LOG_PROBABILITY = -1e4


class Objective(NamedTuple):
    """What [`distillation_objective`] measures.

    Args:
        loss (`torch.Tensor` of shape `()`): `kd_weight * sum(divergence) + ce_weight * sum(smoothed cross_entropy)`.
        divergence (`torch.Tensor` of shape `(num_positions,)`): In nats, without `temperature**2` and any weight.
        cross_entropy (`torch.Tensor` of shape `(num_positions,)`): In nats, without label smoothing.
        entropy (`torch.Tensor` of shape `(num_positions,)`): Of the student, in nats; on CUDA, in training, that of
            the softened student over the common tokens.
        agreement (`torch.Tensor` of shape `(num_positions,)`): 1 where both models' likeliest tokens are the same.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    agreement: torch.Tensor


class ObjectiveSettings(NamedTuple):
    """How [`distillation_objective`] weighs its parts.

    Args:
        kd_weight (`float` or `torch.Tensor` of shape `()`): Of the summed divergence; includes `temperature**2`.
        ce_weight (`float` or `torch.Tensor` of shape `()`): Of the summed cross-entropy.
        beta (`float`): 0 is the forward KL divergence, 1 the reverse one, between them the generalised JSD.
        temperature (`float`): Softens both distributions of the divergence; > 0.
        label_smoothing (`float`): Share of the target's probability that goes to all tokens; cross-entropy only.
        num_common_tokens (`int`): Token ids below it mean the same to both models; the divergence compares these.
        logits_budget_bytes (`int`): Size of one chunk of float32 logits of one model.
    """

    kd_weight: float | torch.Tensor
    ce_weight: float | torch.Tensor
    beta: float
    temperature: float
    label_smoothing: float
    num_common_tokens: int
    logits_budget_bytes: int = LOGITS_BUDGET_BYTES


def token_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """Divergence between the next-token distributions of student and teacher at each position, in nats.

    Args:
        student_logits (`torch.FloatTensor` of shape `(..., vocab_size)`): float32.
        teacher_logits (`torch.FloatTensor` of the same shape): Carries no gradient.
        beta (`float`, *optional*, defaults to 0.0): 0 is KL(teacher || student), 1 is KL(student || teacher). Between
            them, with the mixture `m = (1 - beta) * student + beta * teacher`, it is
            `beta * KL(teacher || m) + (1 - beta) * KL(student || m)`: TRL's meaning.
        temperature (`float`, *optional*, defaults to 1.0): Divides both logits; > 0.

    Returns:
        `torch.Tensor` of shape `(...)`: Not scaled by `temperature**2`. A token that the teacher excludes by a logit
        of -inf counts as one of probability exp(-10000), so that the reverse divergence stays finite.

    Raises:
        ValueError: The two models score different vocabularies or numbers of positions.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must have "
            "one shape: whole next-token distributions are compared. Use a teacher with the student's tokenizer."
        )
    student = F.log_softmax(student_logits / temperature, dim=-1)
    return _divergence(student, student.exp(), _teacher_log_probabilities(teacher_logits / temperature), beta)[0]


def _teacher_log_probabilities(logits):
    """A teacher may exclude a token by a logit of -inf; what is never predicted is to add 0, not 0 x inf."""
    return F.log_softmax(logits, dim=-1).clamp_(min=LOWEST_LOG_PROBABILITY)


def _divergence(log_student, student, log_teacher, beta):
    """The divergence of shape (N,), and its gradient for the softened student's logits of shape (N, V)."""
    if beta == 0.0:
        teacher = log_teacher.exp()
        return torch.linalg.vecdot(teacher, log_teacher - log_student), student - teacher
    log_mixture = log_teacher
    if beta < 1.0:
        log_mixture = torch.logaddexp(log_student + math.log(1 - beta), log_teacher + math.log(beta))
    surplus = log_student - log_mixture
    of_student = torch.linalg.vecdot(student, surplus)
    gradient = student * (surplus - of_student[..., None])
    if beta == 1.0:
        return of_student, gradient
    of_teacher = torch.linalg.vecdot(log_teacher.exp(), log_teacher - log_mixture)
    return beta * of_teacher + (1 - beta) * of_student, (1 - beta) * gradient


def distillation_objective(
    student_hidden: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden: torch.Tensor | None,
    teacher_head: OutputHead | None,
    labels: torch.Tensor,
    settings: ObjectiveSettings,
) -> Objective:
    """Weighted sum of divergence and cross-entropy over positions, with what it is made of.

    On CUDA, where both heads are plain, the divergence runs on TRL's Triton kernel, which keeps no logits at all;
    everywhere else on chunks that fit `settings.logits_budget_bytes`, as dense logits if they do as a whole.

    Args:
        student_hidden (`torch.Tensor` of shape `(num_positions, student_width)`): As they enter `student_head`.
        student_head ([`OutputHead`]): Of the student; its weight and bias are given gradients.
        teacher_hidden (`torch.Tensor` of shape `(num_positions, teacher_width)`, *optional*): `None` leaves the
            divergence out: it and the agreement are 0.
        teacher_head ([`OutputHead`], *optional*): Of the teacher.
        labels (`torch.LongTensor` of shape `(num_positions,)`): Token that each position is to predict.
        settings ([`ObjectiveSettings`]): Weights and kind of divergence.

    Returns:
        [`Objective`]: 0, still differentiable, for no positions.
    """
    is_plain = teacher_hidden is not None and student_head.weight is not None and teacher_head.weight is not None
    if is_plain and student_hidden.is_cuda and torch.is_grad_enabled():
        return _objective_on_kernel(student_hidden, student_head, teacher_hidden, teacher_head, labels, settings)
    weight, bias = student_head.weight, student_head.bias
    student_hidden, student_head = _as_in_autocast(student_hidden, student_head)
    if teacher_hidden is not None:
        teacher_hidden, teacher_head = _as_in_autocast(teacher_hidden, teacher_head)
    inputs = (student_hidden, weight, bias)
    if not torch.is_grad_enabled():
        inputs = (None if value is None else value.detach() for value in inputs)
    return Objective(*_ChunkedObjective.apply(*inputs, student_head, teacher_hidden, teacher_head, labels, settings))


def _as_in_autocast(hidden, head):
    """Both in the precision that a matrix product of them would have, so that the head is cast once."""
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), head.cast(dtype)


def _objective_on_kernel(student_hidden, student_head, teacher_hidden, teacher_head, labels, settings):
    """The divergence by TRL's kernel and the cross-entropy in chunks. Agreement is measured in evaluation only."""
    from .trl_hooks import kernel_divergence

    divergence, entropy = kernel_divergence(student_hidden, student_head, teacher_hidden, teacher_head, settings)
    cross_entropy = distillation_objective(student_hidden, student_head, None, None, labels, settings)
    loss = settings.kd_weight * divergence.sum() + cross_entropy.loss
    nothing = torch.full_like(entropy, torch.nan)
    return Objective(loss, divergence.detach(), cross_entropy.cross_entropy, entropy, nothing)


class _ChunkedObjective(torch.autograd.Function):
    """Computes the gradients together with the loss, so that no logits outlive their chunk and none are made twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, teacher_hidden, teacher_head, labels, settings):
        loss = torch.zeros((), device=hidden.device)
        parts = [torch.zeros(len(hidden), device=hidden.device) for _ in range(4)]
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        rows = max(1, settings.logits_budget_bytes // (4 * _largest_table(hidden, head, teacher_hidden, teacher_head)))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            teacher_logits = None if teacher_hidden is None else teacher_head.logits(teacher_hidden[chunk])
            logits = head.logits(hidden[chunk])
            chunk_loss, chunk_parts, gradient = _chunk_objective(logits, teacher_logits, labels[chunk], settings)
            loss += chunk_loss
            for part, chunk_part in zip(parts, chunk_parts, strict=True):
                part[chunk] = chunk_part
            if any(ctx.needs_input_grad):
                gradients.add(chunk, head.pulled_back(gradient, logits), hidden[chunk], head)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _largest_table(hidden, head, teacher_hidden, teacher_head):
    sizes = [head.vocab_size(hidden)]
    if teacher_hidden is not None:
        sizes.append(teacher_head.vocab_size(teacher_hidden))
    return max(sizes)


class _Gradients:
    """Sums over chunks of the loss's gradients for hidden states, weight and bias, where they are needed."""

    def __init__(self, hidden, weight, bias, needed):
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] else None

    def add(self, chunk, gradient, hidden, head):
        """Adds those of a chunk, from the gradient for its logits of shape (N, V)."""
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


def _chunk_objective(logits, teacher_logits, labels, settings):
    """Loss, its parts of shape (N,), and its gradient for the student's float32 logits of shape (N, V)."""
    log_student = F.log_softmax(logits, dim=-1)
    student = log_student.exp()
    smoothing, vocab_size = settings.label_smoothing, logits.shape[-1]
    cross_entropy = -log_student.gather(-1, labels[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(student, log_student)
    divergence = agreement = torch.zeros_like(cross_entropy)
    loss = settings.ce_weight * (1 - smoothing) * cross_entropy.sum()
    gradient = settings.ce_weight * student
    at_labels = torch.as_tensor(settings.ce_weight * (smoothing - 1), dtype=gradient.dtype, device=gradient.device)
    gradient.scatter_add_(-1, labels[:, None], at_labels.expand(len(labels), 1))
    if smoothing:
        loss -= settings.ce_weight * smoothing * log_student.mean(-1).sum()
        gradient -= settings.ce_weight * smoothing / vocab_size
    if teacher_logits is not None:
        divergence, of_divergence = _softened_divergence(logits, log_student, student, teacher_logits, settings)
        common = slice(settings.num_common_tokens)
        agreement = (logits[:, common].argmax(-1) == teacher_logits[:, common].argmax(-1)).float()
        loss += settings.kd_weight * divergence.sum()
        gradient[:, common].add_(of_divergence.mul_(settings.kd_weight / settings.temperature))
    return loss, (divergence, cross_entropy, entropy, agreement), gradient


def _softened_divergence(logits, log_student, student, teacher_logits, settings):
    common, temperature = slice(settings.num_common_tokens), settings.temperature
    if temperature != 1.0 or logits.shape[-1] != settings.num_common_tokens:
        log_student = F.log_softmax(logits[:, common] / temperature, dim=-1)
        student = log_student.exp()
    if temperature != 1.0:
        teacher_logits = teacher_logits / temperature
    return _divergence(log_student, student, _teacher_log_probabilities(teacher_logits[:, common]), settings.beta)


__all__ = ["Objective", "ObjectiveSettings", "distillation_objective", "token_divergence"]
