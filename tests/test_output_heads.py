# SPDX-License-Identifier: Apache-2.0
"""Hidden states that enter an output head, and the logits that they become."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from conftest import build_model, randomize
from encdec_slm.trainers.output_heads import HeadReader, OutputHead


SIZES = {
    **{"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
DECODER_ONLY = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}
ENCODER_DECODERS = ("EncDecSLM", "T5", "BART")
# PEFT 0.21 uses a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def build(family):
    if family == "EncDecSLM":
        return build_model()
    if family == "T5":
        sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        # Since v5 this and not tied embeddings decides about d_model**-0.5 in front of the head.
        config = transformers.T5Config(**sizes, decoder_start_token_id=0, scale_decoder_outputs=True)
        return randomize(transformers.T5ForConditionalGeneration(config)).eval()
    if family == "BART":
        stack = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}
        stacks = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in stack.items()}
        config = transformers.BartConfig(vocab_size=61, d_model=16, max_position_embeddings=32, **stacks)
        return randomize(transformers.BartForConditionalGeneration(config)).eval()
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **DECODER_ONLY[family]})
    return randomize(getattr(transformers, f"{family}ForCausalLM")(config)).eval()


def build_inputs(model):
    """Two rows of five tokens, the second padded on the right by two."""
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 61, (2, 4), generator=torch.Generator().manual_seed(2))
    return inputs


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", [*ENCODER_DECODERS, *DECODER_ONLY])
@torch.no_grad()
def test_the_head_turns_hidden_states_into_the_models_logits_and_one_position_passes_it(family, caplog):
    model, reader, passed = build(family), HeadReader("teacher"), []
    inputs = build_inputs(model)
    expected = model(**inputs).logits
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: passed.append(args[0].shape[:-1]))
    for _ in range(2):  # the first call checks the head, the others rely on it
        hidden = reader(model, **inputs)
        assert hidden.shape == (*expected.shape[:2], model.get_output_embeddings().weight.shape[1])
        torch.testing.assert_close(reader.head(model).logits(hidden), expected)
    assert reader.head_is_known and not caplog.records
    assert passed == [(1, 1)] * 2
    if family in ("Gemma2", "Cohere", "Granite"):
        bare = OutputHead(model.get_output_embeddings().weight).logits(hidden)
        assert not torch.allclose(bare, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", [*ENCODER_DECODERS, "Llama"])
def test_gradients_flow_back_from_hidden_states(family):
    model, reader = build(family), HeadReader("student")
    inputs = build_inputs(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    hidden = reader(model, **inputs)
    weight = draw(*hidden.shape)
    gradients = torch.autograd.grad((hidden * weight).sum(), parameters, allow_unused=True)
    whole = model(**inputs, output_hidden_states=True)
    last = whole.decoder_hidden_states[-1] if model.config.is_encoder_decoder else whole.hidden_states[-1]
    factor = 16**-0.5 if family == "T5" else 1
    expected = torch.autograd.grad((factor * last * weight).sum(), parameters, allow_unused=True)
    for name, gradient, value in zip(names, gradients, expected, strict=True):
        assert (gradient is None) == (value is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, value)


def build_with_unknown_head(kind):
    """A model whose logits are not those of its output head alone."""
    if kind == "bias behind the head":
        model = build("BART")
        model.final_logits_bias += draw(*model.final_logits_bias.shape)
        return model
    model = build("Llama")
    if kind == "other logits":
        model.get_output_embeddings().register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
        return model
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(model, config).get_base_model()


@pytest.mark.parametrize("kind", ["bias behind the head", "other logits", "adapter on the head"])
@torch.no_grad()
def test_a_model_with_an_unknown_head_returns_its_logits_and_warns_once(kind, caplog):
    model, reader = build_with_unknown_head(kind), HeadReader("student")
    inputs = build_inputs(model)
    expected = model(**inputs).logits
    for _ in range(2):
        logits = reader(model, **inputs)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(reader.head(model).logits(logits), expected)
    assert reader.head(model).weight is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_behind(fails):
    model, reader = build("Llama"), HeadReader("teacher")
    head = model.get_output_embeddings()

    def fail(module, args, output):
        raise RuntimeError("out of memory")

    if fails:
        handle = head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            reader(model, **build_inputs(model))
        handle.remove()
    else:
        reader(model, **build_inputs(model))
    assert not head._forward_pre_hooks
    assert model(**build_inputs(model)).logits.shape == (2, 5, 61)


@torch.no_grad()
def test_a_head_in_half_precision_is_known():
    model, reader = build("Llama").bfloat16(), HeadReader("teacher")
    inputs = build_inputs(model)
    hidden = reader(model, **inputs)
    logits = reader.head(model).logits(hidden)
    assert reader.head_is_known and logits.dtype == torch.float32
    # Eight bits of mantissa.
    torch.testing.assert_close(logits, model(**inputs).logits.float(), rtol=1e-2, atol=1e-2)


def test_a_head_without_a_weight_returns_logits_unchanged():
    logits = draw(3, 7)
    assert torch.equal(OutputHead(None, scale=2.0, softcap=1.0).logits(logits), logits)
    assert OutputHead(None).vocab_size(logits) == 7


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 2.0), (3.0, 1.5)])
def test_a_head_scales_before_it_caps_and_its_gradient_is_that_of_autograd(scale, softcap):
    hidden, weight, bias, gradient = draw(3, 5), draw(7, 5), draw(7), draw(3, 7)
    head = OutputHead(weight, bias, scale, softcap)
    projected = (hidden @ weight.T + bias).requires_grad_()
    logits = scale * projected if softcap is None else softcap * torch.tanh(scale * projected / softcap)
    torch.testing.assert_close(head.logits(hidden), logits.detach())
    (expected,) = torch.autograd.grad(logits, projected, gradient)
    torch.testing.assert_close(head.projection_gradient(gradient, head.logits(hidden)), expected)
