# SPDX-License-Identifier: Apache-2.0
"""The objective against its definition, computed with whole logits and ordinary autograd.

N positions, D width, V vocabulary.
"""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import LabelSmoother
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from encdec_slm.trainers.distillation_losses import (
    ObjectiveSettings,
    _objective_on_kernel,
    distillation_objective,
    token_divergence,
)
from encdec_slm.trainers.output_heads import OutputHead


BETAS = (0, 0.1, 0.5, 0.9, 1)
NUM_POSITIONS, WIDTH, VOCAB_SIZE = 11, 6, 17
TEACHER_WIDTH, TEACHER_VOCAB_SIZE = 5, 19
NUM_COMMON = 15
# What the specification asks for: sums of float32 are taken in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settings_of(**changes):
    defaults = {
        "kd_weight": 0.7,
        "ce_weight": 0.3,
        "beta": 0.5,
        "temperature": 1.0,
        "label_smoothing": 0.0,
        "num_common_tokens": NUM_COMMON,
        "logits_budget_bytes": 4 * 4 * VOCAB_SIZE,  # four positions at a time: the last chunk of eleven has three
    }
    return ObjectiveSettings(**{**defaults, **changes})


@pytest.fixture
def labels():
    return torch.randint(0, VOCAB_SIZE, (NUM_POSITIONS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student():
    """Hidden states, weight and bias of the student, which all want a gradient."""
    tensors = (
        draw(NUM_POSITIONS, WIDTH, seed=2),
        draw(VOCAB_SIZE, WIDTH, seed=3, scale=0.7),
        draw(VOCAB_SIZE, seed=4, scale=0.3),
    )
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.fixture
def teacher():
    return draw(NUM_POSITIONS, TEACHER_WIDTH, seed=5), OutputHead(draw(TEACHER_VOCAB_SIZE, TEACHER_WIDTH, seed=6))


def defined_divergence(student_logits, teacher_logits, beta, temperature):
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    if beta == 0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1:
        return (q * (q / p).log()).sum(-1)
    m = (1 - beta) * q + beta * p
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def dense_logits(hidden, weight, bias, scale=1.0, softcap=None):
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def dense_loss(student_logits, teacher_logits, labels, settings):
    common = settings.num_common_tokens
    divergence = defined_divergence(
        student_logits[:, :common], teacher_logits[:, :common], settings.beta, settings.temperature
    )
    nats = -student_logits.log_softmax(-1)
    smoothing = settings.label_smoothing
    cross_entropy = nats[torch.arange(len(labels)), labels]
    cross_entropy = (1 - smoothing) * cross_entropy + smoothing * nats.mean(-1)
    return settings.kd_weight * divergence.sum() + settings.ce_weight * cross_entropy.sum()


def assert_is_dense(student, teacher, labels, settings, scale=1.0, softcap=None, function=distillation_objective):
    """The loss of `function` and the gradients of all that wants one equal those of whole logits."""
    hidden, weight, bias = student
    teacher_hidden, teacher_head = teacher
    teacher_logits = dense_logits(
        teacher_hidden, teacher_head.weight, teacher_head.bias, teacher_head.scale, teacher_head.softcap
    )
    expected = dense_loss(dense_logits(hidden, weight, bias, scale, softcap), teacher_logits, labels, settings)
    loss = function(hidden, OutputHead(weight, bias, scale, softcap), *teacher, labels, settings).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    wanted = [tensor for tensor in student if tensor is not None and tensor.requires_grad]
    for gradient, value in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(gradient, value, **CLOSE)


# The divergence


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_token_divergence_matches_the_definition_in_value_and_gradient(beta, temperature):
    student, teacher = draw(2, 3, 7).requires_grad_(), draw(2, 3, 7, seed=1)
    divergence = token_divergence(student, teacher, beta, temperature)
    expected = defined_divergence(student, teacher, beta, temperature)
    torch.testing.assert_close(divergence, expected)
    gradient, value = (torch.autograd.grad(result.sum(), student)[0] for result in (divergence, expected))
    torch.testing.assert_close(gradient, value)


def test_beta_0_is_the_forward_and_beta_1_the_reverse_divergence():
    student, teacher = draw(4, 7), draw(4, 7, seed=1)
    log_q, log_p = (torch.distributions.Categorical(logits=logits) for logits in (student, teacher))
    forward, reverse = torch.distributions.kl_divergence(log_p, log_q), torch.distributions.kl_divergence(log_q, log_p)
    assert not torch.allclose(forward, reverse, atol=1e-2)
    torch.testing.assert_close(token_divergence(student, teacher, beta=0.0), forward)
    torch.testing.assert_close(token_divergence(student, teacher, beta=1.0), reverse)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [float(beta) for beta in BETAS])
def test_token_divergence_is_that_of_trl_s_kernel(student, beta, temperature):
    hidden, weight, bias = (tensor.detach() for tensor in student)
    teacher_hidden, teacher_weight = draw(NUM_POSITIONS, TEACHER_WIDTH, seed=5), draw(VOCAB_SIZE, TEACHER_WIDTH)
    kernel, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, bias, teacher_hidden, teacher_weight, None, beta, temperature
    )
    logits, teacher_logits = hidden @ weight.T + bias, teacher_hidden @ teacher_weight.T
    torch.testing.assert_close(token_divergence(logits, teacher_logits, beta, temperature), kernel, **CLOSE)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_token_divergence_is_that_of_trl_s_gkd(beta, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL says that its experimental names may move
        gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    student, teacher = draw(5, 7), draw(5, 7, seed=1)
    expected = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, None, beta, temperature, reduction="none")
    torch.testing.assert_close(token_divergence(student, teacher, beta, temperature), expected.sum(-1), **CLOSE)


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence(beta, temperature):
    logits = draw(3, 7, scale=3)
    divergence = token_divergence(logits + 5, logits, beta, temperature)  # a shift of all logits changes nothing
    torch.testing.assert_close(divergence, torch.zeros(3))


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9])
def test_tokens_that_the_teacher_excludes_leave_value_and_gradient_finite(beta):
    student, teacher = draw(4, 7).requires_grad_(), draw(4, 7, seed=1)
    teacher[:, 2] = teacher[1, 5] = -torch.inf
    divergence = token_divergence(student, teacher, beta)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = q if beta == 0 else (1 - beta) * q + beta * p
    expected = torch.xlogy(p, p).sub(p * m.log()).sum(-1)
    if beta:
        expected = beta * expected + (1 - beta) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(divergence, expected.float())
    gradient, value = (torch.autograd.grad(result.sum(), student)[0] for result in (divergence, expected))
    torch.testing.assert_close(gradient, value)


def test_a_student_that_believes_in_what_the_teacher_excludes_diverges_much_but_not_infinitely():
    student, teacher = draw(4, 7).requires_grad_(), draw(4, 7, seed=1)
    teacher[:, 2] = -torch.inf
    divergence = token_divergence(student, teacher, beta=1.0)
    assert (divergence > 100).all() and divergence.isfinite().all()
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    assert gradient.isfinite().all() and (gradient[:, 2] > 0).all()  # a step makes that token less likely


def test_logits_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Student logits \(3, 7\) and teacher logits \(3, 9\) must have one shape"):
        token_divergence(draw(3, 7), draw(3, 9))


# The objective


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_chunks_equal_whole_logits(student, teacher, labels, beta, temperature, label_smoothing):
    settings = settings_of(beta=beta, temperature=temperature, label_smoothing=label_smoothing)
    assert_is_dense(student, teacher, labels, settings)


@pytest.mark.parametrize("num_rows", [0.1, 1, 2, 3, 4, 5, 10, 11, 50])
def test_any_size_of_chunk_gives_the_same(student, teacher, labels, num_rows):
    budget = int(num_rows * 4 * VOCAB_SIZE)
    assert_is_dense(student, teacher, labels, settings_of(label_smoothing=0.1, logits_budget_bytes=budget))


@pytest.mark.parametrize("num_common_tokens", [2, NUM_COMMON, VOCAB_SIZE])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_scales_and_caps_behind_the_head_reach_the_gradient(
    student, teacher, labels, beta, scale, softcap, num_common_tokens
):
    teacher_hidden, teacher_head = teacher
    capped = OutputHead(teacher_head.weight, draw(TEACHER_VOCAB_SIZE, seed=7), scale=0.5, softcap=4.0)
    settings = settings_of(beta=beta, num_common_tokens=num_common_tokens)
    assert_is_dense(student, (teacher_hidden, capped), labels, settings, scale, softcap)


@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (torch.tensor(0.2), torch.tensor(2.0))])
def test_each_part_has_its_weight(student, teacher, labels, kd_weight, ce_weight):
    assert_is_dense(student, teacher, labels, settings_of(kd_weight=kd_weight, ce_weight=ce_weight))


def test_a_head_without_bias_needs_none(student, teacher, labels):
    hidden, weight, _ = student
    assert_is_dense((hidden, weight, None), teacher, labels, settings_of())


def test_a_loss_that_is_scaled_afterwards_scales_its_gradients(student, teacher, labels):
    hidden, weight, bias = student
    loss = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings_of()).loss
    plain = torch.autograd.grad(loss, student, retain_graph=True)
    for gradient, scaled in zip(plain, torch.autograd.grad(loss * 3 / 4, student), strict=True):
        torch.testing.assert_close(scaled, gradient * 3 / 4)


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_wants_a_gradient_is_given_one(student, teacher, labels, wants):
    """With adapters the head is frozen, and hidden states alone want one."""
    for tensor, wants_gradient in zip(student, wants, strict=True):
        tensor.requires_grad_(wants_gradient)
    assert_is_dense(student, teacher, labels, settings_of(label_smoothing=0.1))
    hidden, weight, bias = student
    distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings_of()).loss.backward()
    assert [tensor.grad is not None for tensor in student] == list(wants)


def test_a_student_of_which_nothing_wants_a_gradient_gets_a_plain_value(student, teacher, labels):
    hidden, weight, bias = (tensor.detach() for tensor in student)
    loss = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings_of()).loss
    assert not loss.requires_grad


def test_without_gradients_the_value_is_the_same(student, teacher, labels):
    hidden, weight, bias = student
    loss = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings_of()).loss
    with torch.no_grad():
        evaluated = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings_of()).loss
    assert loss.requires_grad and not evaluated.requires_grad
    torch.testing.assert_close(evaluated, loss.detach())


@pytest.mark.parametrize("role", ["student", "teacher", "both"])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_logits_may_be_given_instead_of_hidden_states(student, teacher, labels, role, beta):
    hidden, weight, bias = student
    logits = dense_logits(*student)
    teacher_hidden, teacher_head = teacher
    settings = settings_of(beta=beta, label_smoothing=0.1)
    expected = dense_loss(logits, teacher_hidden @ teacher_head.weight.T, labels, settings)
    student_inputs = (hidden, OutputHead(weight, bias)) if role == "teacher" else (logits, OutputHead(None))
    if role != "student":
        teacher = teacher_hidden @ teacher_head.weight.T, OutputHead(None)
    loss = distillation_objective(*student_inputs, *teacher, labels, settings).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradients = torch.autograd.grad(loss, student, retain_graph=True)
    for gradient, value in zip(gradients, torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(gradient, value, **CLOSE)


@pytest.mark.parametrize("function", [distillation_objective, _objective_on_kernel])
def test_no_positions_make_a_loss_of_zero_that_has_a_gradient(student, teacher, function):
    hidden, weight, bias = student
    teacher_hidden, teacher_head = teacher
    if function is _objective_on_kernel:
        teacher_head = OutputHead(teacher_head.weight)
    nothing = torch.zeros(0, dtype=torch.long)
    result = function(
        hidden[:0], OutputHead(weight, bias), teacher_hidden[:0], teacher_head, nothing, settings_of(beta=0.0)
    )
    assert result.loss == 0 and result.loss.shape == ()
    assert [part.shape for part in result[1:]] == [(0,)] * 4
    for gradient, tensor in zip(torch.autograd.grad(result.loss, student), student, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_label_smoothing_is_that_of_transformers(student, labels):
    hidden, weight, bias = student
    settings = settings_of(kd_weight=0.0, ce_weight=1 / NUM_POSITIONS, label_smoothing=0.15)
    loss = distillation_objective(hidden, OutputHead(weight, bias), None, None, labels, settings).loss
    expected = LabelSmoother(epsilon=0.15)({"logits": dense_logits(*student)[None]}, labels[None])
    torch.testing.assert_close(loss, expected)
    for gradient, value in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(gradient, value)


def test_label_smoothing_changes_only_the_cross_entropy_in_the_loss(student, teacher, labels):
    hidden, weight, bias = student

    def measure(**changes):
        return distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings_of(**changes))

    plain, smoothed = measure(), measure(label_smoothing=0.3)
    assert not torch.allclose(plain.loss, smoothed.loss)
    for part, smoothed_part in zip(plain[1:], smoothed[1:], strict=True):
        assert torch.equal(part, smoothed_part)
    no_ce = {"ce_weight": 0.0}
    assert torch.equal(measure(**no_ce).loss, measure(**no_ce, label_smoothing=0.3).loss)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_that_pad_a_table_play_no_part_in_the_divergence(student, teacher, labels, beta):
    hidden, weight, bias = student
    bias.data[NUM_COMMON:] += 20  # untrained rows may well be the likeliest
    teacher_hidden, teacher_head = teacher
    settings = settings_of(beta=beta, ce_weight=0.0)
    padded = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings)
    cut = distillation_objective(
        hidden,
        OutputHead(weight[:NUM_COMMON], bias[:NUM_COMMON]),
        teacher_hidden,
        OutputHead(teacher_head.weight[:NUM_COMMON]),
        labels.clamp(max=NUM_COMMON - 1),
        settings,
    )
    for name in ("loss", "divergence", "agreement"):
        torch.testing.assert_close(getattr(padded, name), getattr(cut, name))
    gradients = torch.autograd.grad(padded.loss, student)
    for gradient, value in zip(gradients, torch.autograd.grad(cut.loss, student), strict=True):
        torch.testing.assert_close(gradient, value)
    assert not gradients[1][NUM_COMMON:].any()


def test_the_parts_match_their_definitions(student, teacher, labels):
    hidden, weight, bias = student
    teacher_hidden, teacher_head = teacher
    settings = settings_of(beta=0.1, temperature=2.0, label_smoothing=0.1)
    result = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings)
    logits, teacher_logits = dense_logits(*student).detach(), teacher_hidden @ teacher_head.weight.T
    common, teacher_common = logits[:, :NUM_COMMON], teacher_logits[:, :NUM_COMMON]
    torch.testing.assert_close(result.divergence, defined_divergence(common, teacher_common, 0.1, 2.0), **CLOSE)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(result.cross_entropy, -probabilities[torch.arange(NUM_POSITIONS), labels].log())
    torch.testing.assert_close(result.entropy, -(probabilities * probabilities.log()).sum(-1))
    agreement = [float(ours.argmax() == theirs.argmax()) for ours, theirs in zip(common, teacher_common, strict=True)]
    assert result.agreement.tolist() == agreement
    assert not any(part.requires_grad for part in result[1:])


def test_a_student_agrees_with_itself_only_at_the_same_positions(student, labels):
    hidden, weight, bias = (tensor.detach() for tensor in student)
    head, settings = OutputHead(weight, bias), settings_of(num_common_tokens=VOCAB_SIZE)
    itself = distillation_objective(hidden, head, hidden, head, labels, settings)
    assert itself.agreement.tolist() == [1.0] * NUM_POSITIONS
    torch.testing.assert_close(itself.divergence, torch.zeros(NUM_POSITIONS))
    shifted = distillation_objective(hidden, head, hidden.roll(1, 0), head, labels, settings)
    assert 0 < shifted.agreement.sum() < NUM_POSITIONS or not shifted.agreement.any()
    assert (shifted.divergence > 1e-3).all()


def test_without_a_teacher_only_the_cross_entropy_is_left(student, labels):
    hidden, weight, bias = student
    result = distillation_objective(hidden, OutputHead(weight, bias), None, None, labels, settings_of())
    expected = torch.nn.functional.cross_entropy(dense_logits(*student), labels, reduction="sum")
    torch.testing.assert_close(result.loss, 0.3 * expected)
    assert not result.divergence.any() and not result.agreement.any()


def test_half_precision_weights_get_gradients_of_their_own_kind(student, teacher, labels):
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in student]
    teacher_hidden, teacher_head = teacher
    half_teacher = teacher_hidden.bfloat16(), OutputHead(teacher_head.weight.bfloat16())
    hidden, weight, bias = halves
    result = distillation_objective(hidden, OutputHead(weight, bias), *half_teacher, labels, settings_of())
    assert result.loss.dtype == torch.float32
    gradients = torch.autograd.grad(result.loss, halves)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3
    singles = [tensor.detach().float().requires_grad_() for tensor in halves]
    expected = dense_loss(
        dense_logits(*singles), half_teacher[0].float() @ half_teacher[1].weight.float().T, labels, settings_of()
    )
    for gradient, value in zip(gradients, torch.autograd.grad(expected, singles), strict=True):
        # Eight bits of mantissa: logits and gradients are rounded to 1 part in 256.
        torch.testing.assert_close(gradient.float(), value, rtol=0.05, atol=0.05)


class Devices(TorchDispatchMode):
    """Refuses what CUDA refuses: operations on tensors of two devices, but for numbers without an axis on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
        assert len(devices) < 2, f"{function} on {devices}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(0.7, 0.3), ("tensor", "tensor"), ("tensor", 0.0)])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_everything_stays_on_the_device_of_the_hidden_states(has_teacher, kd_weight, ce_weight, label_smoothing):
    with torch.device("meta"):  # stands for CUDA
        hidden, weight, bias = (torch.empty(*shape, requires_grad=True) for shape in ((11, 6), (17, 6), (17,)))
        teacher = (torch.empty(11, 5), OutputHead(torch.empty(19, 5))) if has_teacher else (None, None)
        weights = [torch.empty(()) if value == "tensor" else value for value in (kd_weight, ce_weight)]
        labels = torch.empty(11, dtype=torch.long)
    settings = settings_of(kd_weight=weights[0], ce_weight=weights[1], label_smoothing=label_smoothing)
    with Devices():
        result = distillation_objective(hidden, OutputHead(weight, bias), *teacher, labels, settings)
        result.loss.backward()
    assert {tensor.device.type for tensor in (*result, hidden.grad, weight.grad, bias.grad)} == {"meta"}


# TRL's kernel, which CUDA takes instead of chunks


@pytest.mark.parametrize("num_common_tokens", [NUM_COMMON, VOCAB_SIZE])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_kernel_equals_whole_logits(
    student, teacher, labels, beta, temperature, scale, softcap, num_common_tokens
):
    settings = settings_of(
        beta=beta, temperature=temperature, label_smoothing=0.1, num_common_tokens=num_common_tokens
    )
    assert_is_dense(student, teacher, labels, settings, scale, softcap, function=_objective_on_kernel)


def test_the_kernel_s_parts_are_those_of_chunks(student, labels):
    hidden, weight, bias = student
    teacher = draw(NUM_POSITIONS, TEACHER_WIDTH, seed=5), OutputHead(draw(VOCAB_SIZE, TEACHER_WIDTH, seed=6))
    settings = settings_of(num_common_tokens=VOCAB_SIZE, label_smoothing=0.1)
    head = OutputHead(weight, bias)
    chunks = distillation_objective(hidden, head, *teacher, labels, settings)
    kernel = _objective_on_kernel(hidden, head, *teacher, labels, settings)
    for name in ("loss", "divergence", "cross_entropy", "entropy"):
        torch.testing.assert_close(getattr(kernel, name), getattr(chunks, name), **CLOSE)
    assert kernel.agreement.isnan().all()  # measured in evaluation only
    assert not any(part.requires_grad for part in kernel[1:])


# Memory


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation gives back, forward and backward."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


def largest_tensor(num_positions, num_rows, vocab_size=512, width=4):
    hidden, weight = draw(num_positions, width).requires_grad_(), draw(vocab_size, width, seed=1).requires_grad_()
    teacher = draw(num_positions, width, seed=2), OutputHead(draw(vocab_size, width, seed=3))
    labels = torch.arange(num_positions)
    settings = settings_of(
        num_common_tokens=vocab_size, label_smoothing=0.1, logits_budget_bytes=num_rows * 4 * vocab_size
    )
    with LargestTensor() as largest:
        distillation_objective(hidden, OutputHead(weight), *teacher, labels, settings).loss.backward()
    return largest.num_elements


def test_no_tensor_is_larger_than_a_chunk_of_logits_however_many_positions_there_are():
    assert largest_tensor(num_positions=64, num_rows=64) == 64 * 512  # the budget holds all: the counter sees it
    assert largest_tensor(num_positions=64, num_rows=8) == 8 * 512
    assert largest_tensor(num_positions=256, num_rows=8) == 8 * 512
