# SPDX-License-Identifier: Apache-2.0
"""What only a CUDA device can show: its attention kernels, half precision, compiled generation."""

from functools import partial

import pytest
import torch
from ddp_worker import history_of
from distillation_worker import make_trainer
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from conftest import build_vision_config, build_vision_inputs, randomize
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration, EncDecVLMForConditionalGeneration
from encdec_slm.trainers.distillation_losses import ObjectiveSettings, distillation_objective
from encdec_slm.trainers.output_heads import OutputHead


pytestmark = [
    pytest.mark.gpu,
    # torch's compiler advises a lower precision, and transformers passes a flag that torch 2.11 deprecates.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]


@pytest.fixture
def cuda_model():
    config = EncDecSLMConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=2,
    )
    return EncDecSLMForConditionalGeneration(config).to("cuda").eval()


@pytest.fixture
def cuda_source():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, (4, 40), generator=generator)
    mask = torch.arange(40) < torch.tensor([40, 17, 32, 5])[:, None]
    return {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}


def logits_with(model, backend, dtype, source):
    model.to(dtype).set_attn_implementation(backend)
    target = source["input_ids"][:, :12]
    with torch.no_grad():
        return model(**source, decoder_input_ids=target).logits.float()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_every_backend_agrees_with_single_precision_in_bfloat16(cuda_model, cuda_source, backend):
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    expected = logits_with(cuda_model, "eager", torch.float32, cuda_source)
    actual = logits_with(cuda_model, backend, torch.bfloat16, cuda_source)
    # bfloat16 keeps 8 bits; six layers add up to about one part in fifty of the spread.
    assert (actual - expected).abs().max() < 0.05 * expected.std() + 0.02


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_gradients_agree_with_eager_attention(cuda_model, cuda_source, backend):
    gradients = {}
    for name in ("eager", backend):
        cuda_model.set_attn_implementation(name)
        cuda_model.zero_grad()
        cuda_model(**cuda_source, labels=cuda_source["input_ids"][:, :12]).loss.backward()
        gradients[name] = cuda_model.get_input_embeddings().weight.grad.clone()
    torch.testing.assert_close(gradients[backend], gradients["eager"], rtol=1e-3, atol=1e-5)


def test_compiled_static_generation_equals_dynamic(cuda_model, cuda_source):
    randomize(cuda_model.cpu()).cuda()
    expected = cuda_model.generate(**cuda_source, min_new_tokens=16, max_new_tokens=16)
    # transformers compiles the decoding step by itself when the cache is static and the device an accelerator.
    actual = cuda_model.generate(**cuda_source, min_new_tokens=16, max_new_tokens=16, cache_implementation="static")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_distillation_kernel_gives_the_loss_and_gradients_of_the_cpu(beta):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    tensors = {
        "hidden": draw(300, 64),
        "head": draw(5000, 64),
        "teacher": draw(300, 96),
        "teacher_head": draw(5000, 96),
    }
    labels = torch.randint(0, 5000, (300,), generator=generator)
    settings = ObjectiveSettings(0.9 / 300, 0.1 / 300, beta, 1.5, 0.0, 4990)
    results = []
    for device in ("cpu", "cuda"):
        hidden, head, teacher, teacher_head = (0.3 * value.to(device) for value in tensors.values())
        objective = distillation_objective(
            hidden.requires_grad_(),
            OutputHead(head.requires_grad_()),
            teacher,
            OutputHead(teacher_head),
            labels.to(device),
            settings,
        )
        objective.loss.backward()
        results.append([value.cpu() for value in (objective.loss.detach(), hidden.grad, head.grad)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)  # TF32 products


def test_a_student_is_distilled_in_half_precision(tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False, bf16=True, lmbda=0.5, kd_ratio=0.9, max_steps=4)
    trainer.train()
    losses = history_of(trainer)
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    assert trainer._student_reader.head_is_known and trainer._teacher_reader.head_is_known


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2"])
def test_images_are_read_by_every_backend_as_in_single_precision(cuda_model, backend):
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    vision_config = {
        **{"model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    }
    model = EncDecVLMForConditionalGeneration(build_vision_config(cuda_model.config, vision_config)).to("cuda").eval()
    inputs = build_vision_inputs(model.config, [[(11, 16)], [], [(160, 240), (8, 8)]])
    inputs = {name: value.cuda() for name, value in inputs.items()}
    expected = logits_with(model, "eager", torch.float32, inputs)
    actual = logits_with(model, backend, torch.bfloat16, inputs)
    assert (actual - expected).abs().max() < 0.05 * expected.std() + 0.02


def test_static_caches_write_what_growing_ones_do_for_every_length(cuda_model):
    randomize(cuda_model.cpu()).cuda()
    for length in (40, 64, 65, 100):
        ids = torch.randint(3, 512, (2, length), generator=torch.Generator().manual_seed(length)).cuda()
        expected = cuda_model.generate(ids, max_new_tokens=8)
        assert torch.equal(cuda_model.generate(ids, max_new_tokens=8, cache_implementation="static"), expected)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    ],
    ids=["8 bit", "4 bit"],
)
def test_bitsandbytes_quantizes_all_but_the_tied_table(cuda_model, cuda_source, config, tmp_path):
    cuda_model.save_pretrained(tmp_path)
    expected = logits_with(cuda_model, "eager", torch.float32, cuda_source)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config, device_map="cuda")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_memory_footprint() < 0.7 * cuda_model.get_memory_footprint()
    with torch.no_grad():
        actual = model(**cuda_source, decoder_input_ids=cuda_source["input_ids"][:, :12]).logits.float()
    # 4 bits leave 16 levels: the logits follow the float ones, they do not equal them.
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.9
    assert model.generate(**cuda_source, max_new_tokens=8, min_new_tokens=8).shape == (4, 9)
