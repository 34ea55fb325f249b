# SPDX-License-Identifier: Apache-2.0
"""The chunked objective against a plain reference with whole logits and autograd.

N positions, D width, V vocabulary.
"""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import LabelSmoother

from encdec_slm.trainers.distillation_losses import ObjectiveSettings, distillation_objective, token_divergence
from encdec_slm.trainers.output_heads import OutputHead


BETAS = (0, 0.1, 0.5, 0.9, 1)
NUM_POSITIONS, WIDTH, VOCAB_SIZE = 11, 6, 17
TEACHER_WIDTH, TEACHER_VOCAB_SIZE = 5, 19
NUM_COMMON = 15
# Sums of float32 are taken in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_settings(**changes):
    defaults = {
        **{"kd_weight": 0.7, "ce_weight": 0.3, "beta": 0.5, "temperature": 1.0, "label_smoothing": 0.0},
        "num_common_tokens": NUM_COMMON,
        "logits_budget_bytes": 4 * 4 * VOCAB_SIZE,  # four positions at a time: the last chunk of eleven has three
    }
    return ObjectiveSettings(**{**defaults, **changes})


@pytest.fixture
def labels():
    return torch.randint(0, VOCAB_SIZE, (NUM_POSITIONS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student():
    """Hidden states, weight and bias of the student, which all require a gradient."""
    tensors = (
        draw(NUM_POSITIONS, WIDTH, seed=2),
        draw(VOCAB_SIZE, WIDTH, seed=3, scale=0.7),
        draw(VOCAB_SIZE, seed=4, scale=0.3),
    )
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.fixture
def teacher():
    return draw(NUM_POSITIONS, TEACHER_WIDTH, seed=5), OutputHead(draw(TEACHER_VOCAB_SIZE, TEACHER_WIDTH, seed=6))


# The plain reference


def plain_divergence(student_logits, teacher_logits, beta, temperature):
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    if beta == 0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1:
        return (q * (q / p).log()).sum(-1)
    m = (1 - beta) * q + beta * p
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def plain_logits(hidden, weight, bias, scale=1.0, softcap=None):
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def plain_loss(student_logits, teacher_logits, labels, settings):
    common = settings.num_common_tokens
    logits = student_logits[:, :common], teacher_logits[:, :common]
    divergence = plain_divergence(*logits, settings.beta, settings.temperature)
    nats = -student_logits.log_softmax(-1)
    smoothing = settings.label_smoothing
    cross_entropy = (1 - smoothing) * nats[torch.arange(len(labels)), labels] + smoothing * nats.mean(-1)
    return settings.kd_weight * divergence.sum() + settings.ce_weight * cross_entropy.sum()


def assert_same(loss, expected, tensors, **close):
    """Assert that two losses and their gradients are equal."""
    torch.testing.assert_close(loss, expected, **close)
    tensors = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors), **close)
    return gradients


def assert_plain(student, teacher, labels, settings, scale=1.0, softcap=None):
    """Assert that loss and gradients of the objective are those of the plain reference."""
    hidden, weight, bias = student
    teacher_hidden, head = teacher
    teacher_logits = plain_logits(teacher_hidden, head.weight, head.bias, head.scale, head.softcap)
    if settings.teacher_token_ids is not None:
        teacher_logits = teacher_logits[:, settings.teacher_token_ids]
    expected = plain_loss(plain_logits(hidden, weight, bias, scale, softcap), teacher_logits, labels, settings)
    loss = distillation_objective(hidden, OutputHead(weight, bias, scale, softcap), *teacher, labels, settings).loss
    assert_same(loss, expected, student, **CLOSE)


# The divergence


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_token_divergence_is_that_of_the_reference_and_of_trls_gkd(beta, temperature):
    student, teacher = draw(2, 3, 7).requires_grad_(), draw(2, 3, 7, seed=1)
    divergence = token_divergence(student, teacher, beta, temperature)
    assert_same(divergence.sum(), plain_divergence(student, teacher, beta, temperature).sum(), [student])
    torch.testing.assert_close(token_divergence(teacher + 5, teacher, beta, temperature), torch.zeros(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that experimental names may move
        gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    expected = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, None, beta, temperature, reduction="none")
    torch.testing.assert_close(divergence, expected.sum(-1), **CLOSE)


def test_beta_0_is_the_forward_and_beta_1_the_reverse_divergence():
    student, teacher = draw(4, 7), draw(4, 7, seed=1)
    q, p = (torch.distributions.Categorical(logits=logits) for logits in (student, teacher))
    forward, reverse = torch.distributions.kl_divergence(p, q), torch.distributions.kl_divergence(q, p)
    assert not torch.allclose(forward, reverse, atol=1e-2)
    torch.testing.assert_close(token_divergence(student, teacher, beta=0.0), forward)
    torch.testing.assert_close(token_divergence(student, teacher, beta=1.0), reverse)


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_that_the_teacher_excludes_leave_value_and_gradient_finite(beta):
    student, teacher = draw(4, 7).requires_grad_(), draw(4, 7, seed=1)
    teacher[:, 2] = teacher[1, 5] = -torch.inf
    divergence = token_divergence(student, teacher, beta)
    if beta == 1:  # large, and a step makes the token less likely
        (gradient,) = torch.autograd.grad(divergence.sum(), student)
        assert (divergence > 100).all() and divergence.isfinite().all()
        assert gradient.isfinite().all() and (gradient[:, 2] > 0).all()
        return
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = q if beta == 0 else (1 - beta) * q + beta * p
    expected = torch.xlogy(p, p).sub(p * m.log()).sum(-1)
    if beta:
        expected = beta * expected + (1 - beta) * (q * (q / m).log()).sum(-1)
    assert_same(divergence.sum(), expected.float().sum(), [student])


def test_logits_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 7\) and \(3, 9\)"):
        token_divergence(draw(3, 7), draw(3, 9))


# The objective


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_chunks_equal_the_reference(student, teacher, labels, beta, temperature, label_smoothing):
    settings = build_settings(beta=beta, temperature=temperature, label_smoothing=label_smoothing)
    assert_plain(student, teacher, labels, settings)


@pytest.mark.parametrize("num_rows", [0.1, 1, 3, 4, 11, 50, None])
def test_any_size_of_chunk_gives_the_same(student, teacher, labels, num_rows):
    budget = None if num_rows is None else int(num_rows * 4 * VOCAB_SIZE)
    assert_plain(student, teacher, labels, build_settings(label_smoothing=0.1, logits_budget_bytes=budget))


@pytest.mark.parametrize("num_common_tokens", [2, NUM_COMMON, VOCAB_SIZE])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_scales_and_caps_of_the_head_reach_the_gradient(
    student, teacher, labels, beta, scale, softcap, num_common_tokens
):
    teacher_hidden, teacher_head = teacher
    capped = OutputHead(teacher_head.weight, draw(TEACHER_VOCAB_SIZE, seed=7), scale=0.5, softcap=4.0)
    settings = build_settings(beta=beta, num_common_tokens=num_common_tokens)
    assert_plain(student, (teacher_hidden, capped), labels, settings, scale, softcap)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_a_trimmed_vocabulary_restricts_and_renormalizes_the_teacher(
    student, teacher, labels, beta, temperature, label_smoothing
):
    teacher_token_ids = torch.tensor([0, 2, 3, 7, 8, 11, 14, 18])
    settings = build_settings(
        **{"beta": beta, "temperature": temperature, "label_smoothing": label_smoothing},
        **{"num_common_tokens": len(teacher_token_ids), "teacher_token_ids": teacher_token_ids},
    )
    assert_plain(student, teacher, labels, settings)
    objective = distillation_objective(student[0], OutputHead(*student[1:]), *teacher, labels, settings)
    probabilities = (teacher[0] @ teacher[1].weight.T).softmax(-1)
    torch.testing.assert_close(objective.kept_mass, probabilities[:, teacher_token_ids].sum(-1))


def test_a_map_of_all_tokens_changes_nothing(student, teacher, labels):
    hidden, weight, bias = student
    plain, mapped = (
        distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, build_settings(**settings))
        for settings in ({}, {"teacher_token_ids": torch.arange(NUM_COMMON)})
    )
    assert_same(mapped.loss, plain.loss, student, **CLOSE)
    torch.testing.assert_close(mapped[1:-1], plain[1:-1])


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (torch.tensor(0.2), torch.tensor(2.0))])
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_part_has_its_weight(student, teacher, labels, weights, has_bias):
    hidden, weight, bias = student
    settings = build_settings(kd_weight=weights[0], ce_weight=weights[1])
    assert_plain((hidden, weight, bias if has_bias else None), teacher, labels, settings)


def test_a_loss_that_is_scaled_afterwards_scales_its_gradients(student, teacher, labels):
    hidden, weight, bias = student
    loss = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, build_settings()).loss
    plain = torch.autograd.grad(loss, student, retain_graph=True)
    scaled = torch.autograd.grad(loss * 3 / 4, student)
    torch.testing.assert_close(scaled, tuple(gradient * 3 / 4 for gradient in plain))


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_trained_receives_a_gradient(student, teacher, labels, trained):
    """With adapters the head is frozen."""
    for tensor, is_trained in zip(student, trained, strict=True):
        tensor.requires_grad_(is_trained)
    assert_plain(student, teacher, labels, build_settings(label_smoothing=0.1))
    hidden, weight, bias = student
    distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, build_settings()).loss.backward()
    assert [tensor.grad is not None for tensor in student] == list(trained)


def test_without_gradients_the_value_is_the_same(student, teacher, labels):
    hidden, weight, bias = student
    loss = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, build_settings()).loss
    with torch.no_grad():
        evaluated = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, build_settings()).loss
    hidden, weight, bias = (tensor.detach() for tensor in student)
    frozen = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, build_settings()).loss
    assert [value.requires_grad for value in (loss, evaluated, frozen)] == [True, False, False]
    torch.testing.assert_close((evaluated, frozen), (loss.detach(),) * 2)


@pytest.mark.parametrize("role", ["student", "teacher", "both"])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_logits_may_be_given_instead_of_hidden_states(student, teacher, labels, role, beta):
    hidden, weight, bias = student
    logits, teacher_logits = plain_logits(*student), teacher[0] @ teacher[1].weight.T
    settings = build_settings(beta=beta, label_smoothing=0.1)
    student_inputs = (hidden, OutputHead(weight, bias)) if role == "teacher" else (logits, OutputHead(None))
    teacher_inputs = teacher if role == "student" else (teacher_logits, OutputHead(None))
    loss = distillation_objective(*student_inputs, *teacher_inputs, labels, settings).loss
    assert_same(loss, plain_loss(logits, teacher_logits, labels, settings), student, **CLOSE)


def test_no_positions_make_a_loss_of_zero_that_has_a_gradient(student, teacher):
    hidden, weight, bias = student
    nothing = torch.zeros(0, dtype=torch.long)
    inputs = (hidden[:0], OutputHead(weight, bias), teacher[0][:0], teacher[1], nothing)
    result = distillation_objective(*inputs, build_settings())
    assert result.loss == 0 and result.loss.shape == ()
    assert [part.shape for part in result[1:]] == [(0,)] * 5
    assert not any(gradient.any() for gradient in torch.autograd.grad(result.loss, student))


def test_label_smoothing_is_that_of_transformers(student, labels):
    hidden, weight, bias = student
    settings = build_settings(kd_weight=0.0, ce_weight=1 / NUM_POSITIONS, label_smoothing=0.15)
    loss = distillation_objective(hidden, OutputHead(weight, bias), None, None, labels, settings).loss
    expected = LabelSmoother(epsilon=0.15)({"logits": plain_logits(*student)[None]}, labels[None])
    assert_same(loss, expected, student)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_that_pad_a_table_are_not_compared(student, teacher, labels, beta):
    hidden, weight, bias = student
    bias.data[NUM_COMMON:] += 20  # untrained rows may be the most probable
    settings = build_settings(beta=beta, ce_weight=0.0)
    padded = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings)
    head, teacher_head = OutputHead(weight[:NUM_COMMON], bias[:NUM_COMMON]), OutputHead(teacher[1].weight[:NUM_COMMON])
    labels = labels.clamp(max=NUM_COMMON - 1)
    cut = distillation_objective(hidden, head, teacher[0], teacher_head, labels, settings)
    torch.testing.assert_close((padded.divergence, padded.agreement), (cut.divergence, cut.agreement))
    gradients = assert_same(padded.loss, cut.loss, student)
    assert not gradients[1][NUM_COMMON:].any()


def test_the_parts_match_their_definitions_and_ignore_label_smoothing(student, teacher, labels):
    hidden, weight, bias = student
    settings = build_settings(beta=0.1, temperature=2.0, label_smoothing=0.1)
    result = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings)
    logits, teacher_logits = plain_logits(*student).detach(), teacher[0] @ teacher[1].weight.T
    common, teacher_common = logits[:, :NUM_COMMON], teacher_logits[:, :NUM_COMMON]
    torch.testing.assert_close(result.divergence, plain_divergence(common, teacher_common, 0.1, 2.0), **CLOSE)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(result.cross_entropy, -probabilities[torch.arange(NUM_POSITIONS), labels].log())
    torch.testing.assert_close(result.entropy, -(probabilities * probabilities.log()).sum(-1))
    agreement = (common.argmax(-1) == teacher_common.argmax(-1)).float()
    assert torch.equal(result.agreement, agreement) and 0 < agreement.sum() < NUM_POSITIONS
    assert not any(part.requires_grad for part in result[1:])


def test_a_student_agrees_with_itself_only_at_the_same_positions(student, labels):
    hidden, weight, bias = (tensor.detach() for tensor in student)
    head, settings = OutputHead(weight, bias), build_settings(num_common_tokens=VOCAB_SIZE)
    itself = distillation_objective(hidden, head, hidden, head, labels, settings)
    assert itself.agreement.tolist() == [1.0] * NUM_POSITIONS
    torch.testing.assert_close(itself.divergence, torch.zeros(NUM_POSITIONS))
    shifted = distillation_objective(hidden, head, hidden.roll(1, 0), head, labels, settings)
    assert (shifted.divergence > 1e-3).all()


def test_without_a_teacher_only_the_cross_entropy_is_left(student, labels):
    hidden, weight, bias = student
    result = distillation_objective(hidden, OutputHead(weight, bias), None, None, labels, build_settings())
    expected = torch.nn.functional.cross_entropy(plain_logits(*student), labels, reduction="sum")
    torch.testing.assert_close(result.loss, 0.3 * expected)
    assert not result.divergence.any() and not result.agreement.any()


def test_half_precision_weights_receive_gradients_of_their_own_kind(student, teacher, labels):
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in student]
    half_teacher = teacher[0].bfloat16(), OutputHead(teacher[1].weight.bfloat16())
    hidden, weight, bias = halves
    result = distillation_objective(hidden, OutputHead(weight, bias), *half_teacher, labels, build_settings())
    assert result.loss.dtype == torch.float32
    gradients = torch.autograd.grad(result.loss, halves)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3
    singles = [tensor.detach().float().requires_grad_() for tensor in halves]
    teacher_logits = half_teacher[0].float() @ half_teacher[1].weight.float().T
    expected = plain_loss(plain_logits(*singles), teacher_logits, labels, build_settings())
    # Eight bits of mantissa.
    close = {"rtol": 0.05, "atol": 0.05}
    values = torch.autograd.grad(expected, singles)
    torch.testing.assert_close([gradient.float() for gradient in gradients], list(values), **close)


# Devices and memory


class OneDevice(TorchDispatchMode):
    """Refuse what CUDA refuses: operations on tensors of two devices, except for numbers on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
        assert len(devices) < 2, f"{function} on {devices}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(0.7, 0.3), ("tensor", "tensor"), ("tensor", 0.0)])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_everything_stays_on_the_device_of_the_hidden_states(has_teacher, weights, label_smoothing):
    with torch.device("meta"):  # in place of CUDA
        hidden, weight, bias = (torch.empty(*shape, requires_grad=True) for shape in ((11, 6), (17, 6), (17,)))
        teacher = (torch.empty(11, 5), OutputHead(torch.empty(19, 5))) if has_teacher else (None, None)
        kd_weight, ce_weight = (torch.empty(()) if value == "tensor" else value for value in weights)
        labels = torch.empty(11, dtype=torch.long)
    settings = build_settings(kd_weight=kd_weight, ce_weight=ce_weight, label_smoothing=label_smoothing)
    with OneDevice():
        result = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings)
        result.loss.backward()
    assert {tensor.device.type for tensor in (*result, hidden.grad, weight.grad, bias.grad)} == {"meta"}


class LargestTensor(TorchDispatchMode):
    """Measure the largest tensor that any operation returns, forward and backward."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize(("num_positions", "num_rows"), [(64, 64), (64, 8), (256, 8)])
def test_no_tensor_is_larger_than_a_chunk_of_logits(num_positions, num_rows, vocab_size=512, width=4):
    hidden, weight = draw(num_positions, width).requires_grad_(), draw(vocab_size, width, seed=1).requires_grad_()
    teacher = draw(num_positions, width, seed=2), OutputHead(draw(vocab_size, width, seed=3))
    budget = {"num_common_tokens": vocab_size, "logits_budget_bytes": num_rows * 4 * vocab_size}
    settings = build_settings(label_smoothing=0.1, **budget)
    trimmed = settings._replace(num_common_tokens=300, teacher_token_ids=torch.arange(300))
    for each in (settings, trimmed):
        with LargestTensor() as largest:
            inputs = (hidden, OutputHead(weight), *teacher, torch.arange(num_positions))
            distillation_objective(*inputs, each).loss.backward()
        assert largest.num_elements == num_rows * vocab_size
