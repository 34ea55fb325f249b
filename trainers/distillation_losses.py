# SPDX-License-Identifier: Apache-2.0
"""The distillation objective over whole next-token distributions, computed from hidden states in chunks of positions.

N positions, D width, V vocabulary. No tensor of `N x V` exists beyond one chunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .output_heads import OutputHead


# One chunk of float32 logits, per model. The objective holds about five tensors of this size at its peak.
LOGITS_BUDGET_BYTES = 2**25


class Objective(NamedTuple):
    """What [`distillation_objective`] measures.

    Args:
        loss (`torch.Tensor` of shape `()`): `kd_weight * sum(divergence) + ce_weight * sum(smoothed cross_entropy)`.
        divergence (`torch.Tensor` of shape `(num_positions,)`): In nats, without `temperature**2` and any weight.
        cross_entropy (`torch.Tensor` of shape `(num_positions,)`): In nats, without label smoothing.
        entropy (`torch.Tensor` of shape `(num_positions,)`): Of the student, in nats.
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
        `torch.Tensor` of shape `(...)`: Not scaled by `temperature**2`.

    Raises:
        ValueError: The two models score different vocabularies or numbers of positions.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must have "
            "one shape: whole next-token distributions are compared. Use a teacher with the student's tokenizer."
        )
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    weights = torch.tensor([1 - beta, beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(student + weights[0], teacher + weights[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(log_p, log_q):
    """KL(p || q) over the last axis. A token that p excludes adds nothing, even where q excludes it too."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1)


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
    inputs = (student_hidden, student_head.weight, student_head.bias)
    if not torch.is_grad_enabled():
        inputs = (None if value is None else value.detach() for value in inputs)
    return Objective(*_ChunkedObjective.apply(*inputs, student_head, teacher_hidden, teacher_head, labels, settings))


def _objective_on_kernel(student_hidden, student_head, teacher_hidden, teacher_head, labels, settings):
    """The divergence by TRL's kernel and the cross-entropy in chunks. Agreement is measured in evaluation only."""
    from .trl_hooks import kernel_divergence

    divergence, entropy = kernel_divergence(student_hidden, student_head, teacher_hidden, teacher_head, settings)
    rest = settings._replace(kd_weight=0.0)
    cross_entropy = distillation_objective(student_hidden, student_head, None, None, labels, rest)
    loss = settings.kd_weight * divergence.sum() + cross_entropy.loss
    nothing = torch.full_like(entropy, torch.nan)
    return Objective(loss, divergence.detach(), cross_entropy.cross_entropy, entropy, nothing)


class _ChunkedObjective(torch.autograd.Function):
    """Computes the gradients together with the loss, so that no logits outlive their chunk and none are made twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, teacher_hidden, teacher_head, labels, settings):
        num_positions = hidden.shape[0]
        totals = [torch.zeros(num_positions, device=hidden.device) for _ in range(4)]
        loss = torch.zeros((), device=hidden.device)
        needs_weight, needs_bias = (value is not None and value.requires_grad for value in (weight, bias))
        grads = _Gradients(hidden, weight if needs_weight else None, bias if needs_bias else None)
        rows = max(1, settings.logits_budget_bytes // (4 * head.vocab_size(hidden)))
        for start in range(0, num_positions, rows):
            chunk = slice(start, start + rows)
            teacher = None if teacher_hidden is None else teacher_head.logits(teacher_hidden[chunk])
            raw = head.raw_logits(hidden[chunk])
            with torch.set_grad_enabled(any(ctx.needs_input_grad[:3])):
                raw.requires_grad_(any(ctx.needs_input_grad[:3]))
                chunk_loss, *parts = _chunk_objective(head.transformed(raw), teacher, labels[chunk], settings)
                if raw.requires_grad:
                    grads.add(chunk, torch.autograd.grad(chunk_loss, raw)[0], hidden[chunk], head)
            loss += chunk_loss.detach()
            for total, part in zip(totals, parts, strict=True):
                total[chunk] = part.detach()
        ctx.save_for_backward(*grads.tensors())
        ctx.mark_non_differentiable(*totals)
        return loss, *totals

    @staticmethod
    def backward(ctx, grad_loss, *_):
        hidden, weight, bias = (
            None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, weight, bias, None, None, None, None, None


class _Gradients:
    """Sums of the loss's gradients over chunks, for those of hidden states, weight and bias that want one."""

    def __init__(self, hidden, weight, bias):
        self.hidden = torch.zeros_like(hidden)
        self.weight = None if weight is None else torch.zeros_like(weight, dtype=torch.float32)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(self, chunk, grad_logits, hidden, head):
        if head.weight is None:
            self.hidden[chunk] = grad_logits.to(self.hidden.dtype)
            return
        grad = grad_logits.to(hidden.dtype)
        self.hidden[chunk] = grad @ head.weight.to(hidden.dtype)
        if self.weight is not None:
            self.weight += grad.mT @ hidden
        if self.bias is not None:
            self.bias += grad_logits.sum(0)

    def tensors(self):
        return self.hidden, self.weight, self.bias


def _chunk_objective(logits, teacher_logits, labels, settings):
    """Loss, divergence, cross-entropy, entropy and agreement of a chunk, from float32 logits of shape (N, V)."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    cross_entropy = -log_probabilities.gather(-1, labels[:, None])[:, 0]
    smoothing = settings.label_smoothing
    smoothed = cross_entropy
    if smoothing:
        smoothed = (1 - smoothing) * cross_entropy - smoothing * log_probabilities.mean(-1)
    detached = log_probabilities.detach()
    entropy = -(detached.exp() * detached).sum(-1)
    divergence = agreement = torch.zeros_like(cross_entropy)
    if teacher_logits is not None:
        common = slice(settings.num_common_tokens)
        divergence = token_divergence(
            logits[:, common], teacher_logits[:, common], settings.beta, settings.temperature
        )
        agreement = (logits[:, common].argmax(-1) == teacher_logits[:, common].argmax(-1)).float()
    loss = settings.kd_weight * divergence.sum() + settings.ce_weight * smoothed.sum()
    return loss, divergence, cross_entropy, entropy, agreement


__all__ = ["Objective", "ObjectiveSettings", "distillation_objective", "token_divergence"]
