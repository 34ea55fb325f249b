# SPDX-License-Identifier: Apache-2.0
"""Against tensors computed by the distillation code of microsoft/encoder-decoder-slm, in fp32.

The original averages the divergence over all positions, padding included, and cuts both models' logits to the
smaller vocabulary. Given its positions and its cut we get its numbers; ours differ, and these tests show by how much.
"""

import json
from pathlib import Path

import pytest
import torch
from ddp_worker import make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.conversion import convert_reference_state_dict, reference_config
from encdec_slm.trainers.distillation_losses import ObjectiveSettings, distillation_objective, token_divergence
from encdec_slm.trainers.output_heads import OutputHead
from encdec_slm.trainers.vocabulary import count_common_tokens


GOLDEN = Path(__file__).parent / "golden"
LOGITS = OutputHead(None)
# The student's logits agree with the original's to 1e-4: the two models round sums differently.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "kd.safetensors")


@pytest.fixture(scope="module")
def text():
    return load_file(GOLDEN / "text_a.cases.safetensors")


@pytest.fixture(scope="module")
def student():
    """The original student, with what becomes of its logits in its KD step."""
    with safe_open(GOLDEN / "text_a.weights.safetensors", "pt") as file:
        config = reference_config(json.loads(file.metadata()["config"]), eos_token_id=79)
    model = EncDecSLMForConditionalGeneration(config).eval()
    weights = load_file(GOLDEN / "text_a.weights.safetensors")
    model.load_state_dict(convert_reference_state_dict(weights, config, False))
    return model


@torch.no_grad()
def logits_of(student, text, decoder_input_ids):
    source = text["main.encoder_input_ids"]
    return student(
        input_ids=source,
        attention_mask=(source != 0).long(),
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=(decoder_input_ids != 0).long(),
    ).logits


def beside(teacher_logits, source_length, target_length):
    """The teacher's logits that predict the target, behind a source padded to `source_length`."""
    return teacher_logits[:, source_length - 1 : source_length - 1 + target_length]


def settings_of(kd_weight, ce_weight, num_common):
    return ObjectiveSettings(kd_weight, ce_weight, 0.0, 1.0, 0.0, num_common)


def objective_of(student_logits, teacher_logits, labels, kd_weight, num_common, ce_weight=0.0):
    """Of positions that are rows already: logits of shape (N, V)."""
    settings = settings_of(kd_weight, ce_weight, num_common)
    return distillation_objective(student_logits, LOGITS, teacher_logits, LOGITS, labels, settings)


# `kd.*`: the original divergence alone, vocabularies of 11 and 9, T_e 6 and T_d 4


def test_divergence_and_gradient_of_the_reference(golden):
    logits = golden["kd.student_logits"].clone().requires_grad_()
    teacher_logits = beside(golden["kd.teacher_logits"], 6, 4)
    labels = torch.zeros(8, dtype=torch.long)
    loss = objective_of(logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels, 1 / 8, num_common=9).loss
    torch.testing.assert_close(loss, golden["kd.loss"])
    assert loss.item() == pytest.approx(3.0847416)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], golden["kd.grad_student_logits"])
    assert not golden["kd.grad_student_logits"][..., 9:].any()


@pytest.mark.parametrize("shift", [-1, 1])
def test_teacher_logits_one_position_off_do_not_give_the_reference_s_number(golden, shift):
    logits, teacher_logits = golden["kd.student_logits"], golden["kd.teacher_logits"]
    shifted = teacher_logits.roll(shift, 1)
    divergence = token_divergence(logits[..., :9], beside(shifted, 6, 4)).mean()
    assert abs(divergence - golden["kd.loss"]) > 0.05


def test_cutting_equals_the_reference_only_because_what_is_cut_are_no_tokens(golden):
    """Rows that pad a table are cut by both. The same cut through different tokens, ours refuses."""
    tokenizer = make_tokenizer()  # of 97 tokens
    assert count_common_tokens(tokenizer, tokenizer, student_vocab_size=128, teacher_vocab_size=112) == 97
    whole = golden["kd.student_logits"].log_softmax(-1)[..., 9:].exp().sum(-1)
    assert whole.max() > 0.1  # were ids 9 and 10 tokens, the student's belief in them would be lost
    other = make_tokenizer()
    other.add_tokens(["only the student's"])
    with pytest.raises(ValueError, match=r"1 of 98 .*97 is"):
        count_common_tokens(other, tokenizer, student_vocab_size=98, teacher_vocab_size=97)


# `kdmodel.*`: one step of the original trainer with `text_a` as the student, vocabularies of 97 and 89


def kd_positions(student, text, golden):
    """Logits of student and teacher at all (3, 8) positions of the student's own text."""
    logits = logits_of(student, text, golden["kdmodel.student_decoder_input_ids"])
    source_length = text["main.encoder_input_ids"].shape[1]
    return logits, beside(golden["kdmodel.teacher_logits"], source_length, 8)


def cross_entropy_of(student, text, ce_weight):
    """On the gold targets, of which 0 is padding."""
    targets = text["main.targets"]
    logits = logits_of(student, text, text["main.decoder_input_ids"])[targets != 0]
    settings = settings_of(0.0, ce_weight, 89)
    return distillation_objective(logits, LOGITS, None, None, targets[targets != 0], settings)


def test_a_step_of_the_reference_at_its_own_positions(student, text, golden):
    logits, teacher_logits = (part.flatten(0, 1) for part in kd_positions(student, text, golden))
    num_positions = 3 * 8  # padding included
    labels = torch.zeros(num_positions, dtype=torch.long)
    kd = objective_of(logits, teacher_logits, labels, 0.9 / num_positions, num_common=89)
    num_gold = int((text["main.targets"] != 0).sum())
    ce = cross_entropy_of(student, text, 0.1 / num_gold)
    torch.testing.assert_close(kd.divergence.mean(), golden["kdmodel.kd_loss"], **CLOSE)
    torch.testing.assert_close(ce.cross_entropy.mean(), golden["kdmodel.ce_loss"], **CLOSE)
    torch.testing.assert_close(kd.loss + ce.loss, golden["kdmodel.loss"], **CLOSE)
    numbers = (golden["kdmodel.loss"], golden["kdmodel.kd_loss"], golden["kdmodel.ce_loss"])
    assert [round(number.item(), 4) for number in numbers] == [11.8639, 11.2870, 17.0557]


def test_our_step_leaves_padding_out_and_differs_by_just_that(student, text, golden):
    logits, teacher_logits = kd_positions(student, text, golden)
    # The decoder reads its targets one position late, so the last target of each row is not on file.
    targets = golden["kdmodel.student_decoder_input_ids"][:, 1:]
    supervised = torch.nn.functional.pad(targets != 0, (0, 1))  # (3, 8)
    num_supervised = int(supervised.sum())
    assert num_supervised == 7 + 4 + 2
    kd = objective_of(
        logits[supervised], teacher_logits[supervised], targets[targets != 0], 0.9 / num_supervised, num_common=89
    )
    num_gold = int((text["main.targets"] != 0).sum())
    ce = cross_entropy_of(student, text, 0.1 / num_gold)
    # Ours. The original's are 11.8639 and 11.2870; its cross-entropy leaves padding out and is ours.
    assert (kd.loss + ce.loss).item() == pytest.approx(11.1814, abs=1e-4)
    assert kd.divergence.mean().item() == pytest.approx(10.5287, abs=1e-4)
    torch.testing.assert_close(ce.cross_entropy.mean(), golden["kdmodel.ce_loss"], **CLOSE)
    # What lies between the two divergences are the positions behind the ends of the texts: 11 of 24.
    behind = token_divergence(logits[..., :89], teacher_logits)[~supervised]
    torch.testing.assert_close((kd.divergence.sum() + behind.sum()) / 24, golden["kdmodel.kd_loss"], **CLOSE)


# `sce.*`: the soft cross-entropy of the original vision model


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("temperature", [1, 2])
def test_soft_cross_entropy_is_forward_divergence_and_the_teacher_s_entropy(golden, temperature, is_masked):
    """The two differ by a number that no student changes, so they have one gradient."""
    student_logits = golden["sce.predicts"].clone().requires_grad_()
    teacher_logits = golden["sce.targets"]
    mask = golden["sce.mask"] if is_masked else torch.ones_like(golden["sce.mask"])
    divergence = token_divergence(student_logits, teacher_logits, beta=0.0, temperature=temperature)[mask].mean()
    softened = (teacher_logits / temperature).softmax(-1)
    entropy = -(softened * softened.log()).sum(-1)[mask].mean()
    expected = golden[f"sce.loss_T{temperature}{'_masked' if is_masked else ''}"]
    torch.testing.assert_close(temperature**2 * (divergence + entropy), expected)
    cross_entropy = -(softened * (student_logits / temperature).log_softmax(-1)).sum(-1)[mask].mean()
    gradients = [torch.autograd.grad(loss, student_logits)[0] for loss in (divergence, cross_entropy)]
    torch.testing.assert_close(*gradients)
