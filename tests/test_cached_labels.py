# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from encdec_slm.trainers.cached_labels import build_cached_labels, compare_with_labels
from encdec_slm.trainers.distillation_losses import token_divergence
from encdec_slm.trainers.teacher_cache import DistributionSpec, Example
from encdec_slm.trainers.teacher_engines import keep_distributions


V, N = 23, 6


def logits(seed, num_positions=N):
    return 2 * torch.randn(num_positions, V, generator=torch.Generator().manual_seed(seed))


def store(teacher_logits, spec, seed=0):
    """Return a row as it comes out of a cache."""
    spec = DistributionSpec.parse(spec)
    prediction = keep_distributions(iter([teacher_logits.log_softmax(-1)]), spec, seed)
    row = Example(0, "", np.zeros(len(teacher_logits)), 0, None, *prediction).to_columns()
    return {name: value for name, value in row.items() if value is not None}


def build(rows, lengths, new_ids=None):
    column = "label_log_probs" if "label_log_probs" in rows[0] else "label_counts"
    return build_cached_labels(rows, lengths, new_ids, column)


def compare(student_logits, labels, beta=0.0):
    log_student = student_logits.log_softmax(-1)
    return compare_with_labels(student_logits, log_student, log_student.exp(), labels, beta)


def bucket_divergence(student_logits, teacher_logits, k, beta):
    """Plain reference: merge all tokens but the teacher's k most probable into one, and compare full distributions."""
    ids = teacher_logits.topk(k).indices

    def merge(values):
        probs = values.softmax(-1)
        kept = probs.gather(-1, ids)
        return torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), -1).log()

    return token_divergence(merge(student_logits), merge(teacher_logits).detach(), beta)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_whole_vocabulary_gives_the_divergence_and_gradient_of_the_live_teacher(beta):
    student, teacher = logits(0).requires_grad_(), logits(1)
    labels = build([store(teacher, f"topk:{V}")], [N])
    divergence, agreement, gradient = compare(student.detach(), labels, beta)
    expected = token_divergence(student, teacher, beta)
    torch.testing.assert_close(divergence, expected.detach(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], atol=1e-3, rtol=1e-3)
    assert agreement.equal((student.argmax(-1) == teacher.argmax(-1)).float())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 5])
def test_all_other_tokens_are_one_bucket(k, beta):
    student, teacher = logits(0).requires_grad_(), logits(1)
    labels = build([store(teacher, f"topk:{k}")], [N])
    divergence, _, gradient = compare(student.detach(), labels, beta)
    expected = bucket_divergence(student, teacher, k, beta)
    torch.testing.assert_close(divergence, expected.detach(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], atol=2e-3, rtol=2e-3)
    # Merging tokens loses information, so that the bound is below the divergence and rises with k.
    assert (divergence <= token_divergence(student.detach(), teacher, beta) + 2e-3).all()


def test_the_error_of_the_top_k_falls_with_k():
    student, teacher = logits(0), logits(1)
    whole = token_divergence(student, teacher)
    errors = []
    for k in (1, 2, 4, 8, 16):
        divergence = compare(student, build([store(teacher, f"topk:{k}")], [N]))[0]
        errors.append((whole - divergence).abs().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_draws_give_an_unbiased_gradient_of_the_forward_divergence():
    student, teacher = logits(0, 1).requires_grad_(), logits(1, 1)
    expected = token_divergence(student, teacher)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum()
    num_labels, num_draws = 2000, 12
    rows = [store(teacher, f"sampled:{num_draws}", seed) for seed in range(num_labels)]
    labels = build(rows, [1] * num_labels)
    divergence, _, gradient = compare(student.detach().expand(num_labels, V), labels)
    # Five standard errors of the mean over the labels.
    assert abs(divergence.mean() - expected - entropy) < 5 * divergence.std() / num_labels**0.5
    assert ((gradient.mean(0) - expected_gradient).abs() <= 5 * gradient.std(0) / num_labels**0.5 + 1e-6).all()


def test_tokens_that_the_student_does_not_have_are_removed_and_the_rest_is_renormalized():
    student, teacher = logits(0)[:, :15], logits(1)
    new_ids = np.full(V, -1)
    kept = np.array([22, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
    new_ids[kept] = np.arange(15)
    labels = build([store(teacher, f"topk:{V}")], [N], new_ids)
    divergence, _, gradient = compare(student, labels)
    student = student.clone().requires_grad_()
    expected = token_divergence(student, teacher[:, kept])
    torch.testing.assert_close(divergence, expected.detach(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(labels.kept_mass, teacher.softmax(-1)[:, kept].sum(-1), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("spec", ["topk:4", "sampled:6"])
def test_rows_are_cut_to_the_positions_that_are_compared(spec):
    rows = [store(logits(seed), spec) for seed in (1, 2)]
    labels = build(rows, [2, 5])
    assert len(labels) == 7
    assert len(labels[2:]) == 5
    alone = build(rows[1:], [5])
    torch.testing.assert_close(compare(logits(0)[:5], labels[2:]), compare(logits(0)[:5], alone))


def test_a_position_without_labels_contributes_nothing():
    row = store(logits(1), "topk:4")
    row["label_num_ids"] = [*row["label_num_ids"][:-1], 0]
    row["label_ids"], row["label_log_probs"] = row["label_ids"][:-4], row["label_log_probs"][:-4]
    divergence, agreement, gradient = compare(logits(0), build([row], [N]))
    assert divergence[-1] == agreement[-1] == 0
    assert (gradient[-1] == 0).all()
    assert (divergence[:-1] > 0).all()
