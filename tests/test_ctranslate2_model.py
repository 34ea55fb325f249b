# SPDX-License-Identifier: Apache-2.0
"""A CTranslate2 export generates what the model generates: greedy, with beams, padded, streamed."""

import shutil
import threading
import time

import ctranslate2
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, TextStreamer

from conftest import build_model, build_source, build_tokenizer
from encdec_slm import Text2TextGenerationPipeline
from encdec_slm.export import CT2EncDecSLM, export_ctranslate2


CONFIGS = {
    "llama": {"tie_word_embeddings": False},
    "original": {
        **{"hidden_act": "gelu_pytorch_tanh", "gated_mlp": False, "attention_bias": True, "mlp_bias": True},
        "eos_bias": 3.5,
    },
    "smollm3": {"encoder_no_rope_layers": [0, 1], "decoder_no_rope_layers": [1, 0]},
}
TEXTS = ["w14 w25 w36 w47 w58 w69 w70", "w10 w11", "", "unknown words"]


def build_pair(folder, seed=0, eos_bias=2.0, tokenizer=None, **fields):
    """A model whose targets end now and then, and its float32 export."""
    model = build_model(seed=seed, **{"lm_head_bias": True, "max_position_embeddings": 24, **fields})
    with torch.no_grad():
        model.lm_head.bias[1] = -100.0  # CTranslate2 does not count the start token as a repetition
        model.lm_head.bias[2] = eos_bias
    export_ctranslate2(model, folder, "float32", tokenizer=tokenizer)
    return model, CT2EncDecSLM.from_pretrained(folder, intra_threads=1)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    return build_pair(tmp_path_factory.mktemp("ct2") / "out", **CONFIGS[request.param])


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct2") / "out"
    return *build_pair(folder, seed=5, tokenizer=build_tokenizer()), folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_targets_of_padded_batches_are_those_of_the_model(pair, side):
    model, exported = pair
    source = build_source(40, 1, 7, 12, 2, 9, padding_side=side)
    expected = model.generate(**source)
    assert torch.equal(exported.generate(**source), expected)
    # Some end earlier than others.
    assert (expected == 2).any() and (expected[:, -1] == 0).any()
    for row, ids, mask in zip(expected, *source.values(), strict=True):
        (alone,) = exported.generate(ids[mask.bool()][None])
        assert torch.equal(row[: len(alone)], alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 1},
        {"max_length": 7},
        {"min_new_tokens": 6, "max_new_tokens": 10},
        {"min_length": 6, "max_length": 11},
        {"eos_token_id": None, "max_new_tokens": 8},
        {"eos_token_id": [2, 5, 17, 40, 60], "pad_token_id": 3},
        {"pad_token_id": None},
        {"eos_token_id": 60, "pad_token_id": None},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"generation_config": GenerationConfig(max_new_tokens=5, eos_token_id=40, pad_token_id=9)},
        {"do_sample": False, "use_cache": True, "bad_words_ids": None, "stop_strings": None},
    ],
    ids=str,
)
def test_generation_settings_have_the_effect_that_they_have_in_transformers(one_pair, settings):
    model, exported, _ = one_pair
    source = build_source(9, 5, 3, 14)
    assert torch.equal(exported.generate(**source, **settings), model.generate(**source, **settings))


def test_the_generation_config_of_the_model_is_exported(tmp_path):
    model = build_model(max_position_embeddings=24)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "eos_token_id": [5, 2]}
    model.generation_config.update(**settings, early_stopping=True)
    export_ctranslate2(model, tmp_path / "out", "float32")
    exported = CT2EncDecSLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.to_dict() == model.generation_config.to_dict()
    source = build_source(5, 8)
    assert torch.equal(exported.generate(**source), model.generate(**source))
    exported.generation_config.max_new_tokens = 3
    assert exported.generate(**source).shape == (4, 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 1.0), (4, 1.0), (4, 0.0), (3, -0.5)])
def test_beams_and_their_scores_are_those_of_an_early_stopping_search(seed, num_beams, length_penalty, tmp_path):
    model, exported = build_pair(tmp_path / "out", seed, eos_bias=seed / 2)
    source = build_source(11, 4, 1, 7, padding_side="left", seed=seed)
    settings = {"num_beams": num_beams, "num_return_sequences": num_beams, "length_penalty": length_penalty}
    settings |= {"max_new_tokens": 16, "return_dict_in_generate": True}
    expected = model.generate(**source, **settings, early_stopping=True, output_scores=True)
    found = exported.generate(**source, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    # Scores are divided and multiplied by powers of lengths, down to `16 ** 0.5` times a sum of 16 terms.
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=2e-4, rtol=1e-5)


def test_beams_end_at_several_end_tokens_as_in_transformers(one_pair):
    model, exported, _ = one_pair
    source = build_source(9, 5, 3)
    settings = {"num_beams": 3, "eos_token_id": [2, 5, 40], "num_return_sequences": 3, "early_stopping": True}
    assert torch.equal(exported.generate(**source, **settings), model.generate(**source, **settings))


def test_sources_that_ctranslate2_takes_for_empty_are_read(one_pair):
    model, exported, _ = one_pair
    for row in ([2], [1], [1, 2], [2, 7], [2, 2], [0], [3, 3, 3], [96]):
        ids = torch.tensor([row])
        assert torch.equal(exported.generate(ids), model.generate(ids, attention_mask=torch.ones_like(ids))), row
    ids = build_source(9, 5, 3, padding_side="left")["input_ids"]
    assert torch.equal(exported.generate(ids), model.generate(ids))
    assert exported.generate(torch.empty(0, 5, dtype=torch.long)).shape[0] == 0


def test_sampling_draws_from_the_distribution_of_transformers(one_pair):
    model, exported, _ = one_pair
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        logits = model(ids, decoder_input_ids=torch.tensor([[1]])).logits[0, -1]
    settings = {"do_sample": True, "max_new_tokens": 1, "temperature": 1.5, "top_k": 6, "top_p": 0.9}
    drawn = exported.generate(ids, num_return_sequences=4000, **settings)[:, 1]
    kept, indices = (logits / 1.5).topk(6)
    probabilities = kept.softmax(-1)
    probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < 0.9)
    expected = torch.zeros(97).scatter(0, indices, probabilities / probabilities.sum())
    # The standard deviation of a share of 4,000 draws is at most 0.008.
    torch.testing.assert_close(drawn.bincount(minlength=97) / 4000, expected, atol=0.04, rtol=0)
    assert len(exported.generate(ids, num_return_sequences=50, do_sample=True, top_k=500).unique(dim=0)) > 10


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"do_sample": True, "typical_p": 0.5, "bad_words_ids": [[4]]}, r"`typical_p` \(0.5.*`bad_words_ids`"),
        ({"decoder_input_ids": torch.tensor([[1, 5]])}, "`decoder_input_ids`"),
        ({"decoder_start_token_id": 7}, r"`decoder_start_token_id` \(7"),
        ({"output_scores": True}, "`output_scores`"),
        ({"no_such_setting": 1}, "`no_such_setting`"),
        ({"generation_config": GenerationConfig(suppress_tokens=[4])}, "`suppress_tokens`.*`generation_config`"),
        ({"num_beams": 2, "early_stopping": "never"}, "`early_stopping` is 'never'"),
        ({"num_beams": 2, "repetition_penalty": 1.2}, r"`repetition_penalty=1\.0`"),
        ({"num_beams": 2, "do_sample": True, "min_length": 4}, "`do_sample=False`, `min_new_tokens=0`"),
        ({"num_beams": 2, "stop_strings": ["w5"]}, "`stop_strings=None`"),
        ({"stop_strings": ["w5"]}, "`tokenizer`"),
        ({"num_return_sequences": 2}, r"`num_return_sequences` \(2\).*`num_beams` \(1\)"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` is 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "`top_p` 1.5"),
    ],
    ids=str,
)
def test_settings_that_are_not_supported_are_refused_by_name(one_pair, settings, names):
    with pytest.raises(ValueError, match=names):
        one_pair[1].generate(torch.tensor([[5, 6]]), **settings)


def test_a_setting_of_the_generation_config_that_beams_cannot_follow_is_named_with_its_origin(tmp_path):
    model = build_model()
    model.generation_config.no_repeat_ngram_size = 3
    export_ctranslate2(model, tmp_path / "out", "float32")
    exported, ids = CT2EncDecSLM.from_pretrained(tmp_path / "out"), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"\(3, from the generation config .*`no_repeat_ngram_size=0`"):
        exported.generate(ids, num_beams=2)
    assert exported.generate(ids, num_beams=2, no_repeat_ngram_size=0, max_new_tokens=4).shape[0] == 1


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 6], [7, 8]], [[1, 1], [0, 0]], "Source 1"),
        ([[5, 6, 7]], [[1, 0, 1]], "Source 0"),
        ([[5, 6, 7]], [[1, 1]], r"`attention_mask` has shape \(1, 2\)"),
    ],
)
def test_masks_that_cannot_be_followed_are_refused(one_pair, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        one_pair[1].generate(torch.tensor(ids), torch.tensor(mask))


class Recorder:
    """A streamer that keeps what it receives."""

    def __init__(self, on_token=lambda: None):
        self.received, self.has_ended, self.on_token = [], False, on_token

    def put(self, value):
        self.received.append(value)
        self.on_token()

    def end(self):
        self.has_ended = True


def test_a_streamer_receives_what_it_receives_from_transformers(one_pair):
    model, exported, _ = one_pair
    for ids in (torch.tensor([[5, 6, 7, 2]]), torch.tensor([[11, 2]])):
        expected, found = Recorder(), Recorder()
        model.generate(ids, streamer=expected)
        target = exported.generate(ids, streamer=found)
        assert [value.tolist() for value in found.received] == [value.tolist() for value in expected.received]
        assert found.has_ended
        assert target[0].tolist() == [value.flatten()[0].item() for value in found.received]


def test_tokens_are_streamed_while_the_next_ones_are_computed(one_pair):
    _, exported, _ = one_pair
    active = []
    streamer = Recorder(lambda: active.append(exported.translator.num_active_batches))
    exported.generate(torch.tensor([[5, 6, 7, 2]]), streamer=streamer, eos_token_id=None, max_new_tokens=3000)
    assert len(streamer.received) == 3001
    assert active[1] == 1


def test_a_reader_that_stops_stops_the_engine(one_pair):
    _, exported, _ = one_pair

    def give_up():
        if len(streamer.received) == 3:
            raise KeyboardInterrupt

    streamer = Recorder(give_up)
    with pytest.raises(KeyboardInterrupt):
        exported.generate(torch.tensor([[5, 6, 7, 2]]), streamer=streamer, eos_token_id=None, max_new_tokens=10**6)
    # A million tokens would take minutes.
    deadline = time.monotonic() + 10
    while exported.translator.num_active_batches and time.monotonic() < deadline:
        time.sleep(0.01)
    assert exported.translator.num_active_batches == 0


def test_streamers_of_transformers_receive_the_text_piece_by_piece(one_pair, capsys):
    _, exported, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    settings = {"eos_token_id": None, "max_new_tokens": 5}
    expected = tokenizer.decode(exported.generate(ids, **settings)[0], skip_special_tokens=True)
    exported.generate(ids, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **settings)
    assert capsys.readouterr().out == f"{expected}\n"
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    thread = threading.Thread(target=exported.generate, args=(ids,), kwargs={"streamer": streamer, **settings})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == expected and len(pieces) > 1


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_only_one_target_is_streamed(one_pair, settings):
    with pytest.raises(ValueError, match="`streamer`"):
        one_pair[1].generate(torch.tensor([[5, 6]]), streamer=Recorder(), **settings)
    with pytest.raises(ValueError, match=r"`streamer` .* 2 targets"):
        one_pair[1].generate(torch.tensor([[5, 6], [7, 8]]), streamer=Recorder())


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"return_tensors": True}], ids=str
)
def test_the_pipeline_gives_what_it_gives_with_the_model(one_pair, options):
    model, exported, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {**options, "early_stopping": True} if "num_beams" in options else options
    expected = Text2TextGenerationPipeline(model=model, tokenizer=build_tokenizer())(TEXTS, batch_size=3, **options)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        pipe = Text2TextGenerationPipeline(model=exported, tokenizer=tokenizer)
        assert str(pipe(TEXTS, batch_size=3, **options)) == str(expected)
    assert str(next(iter(pipe((text for text in TEXTS), **options)))) == str(pipe(TEXTS[0], **options))
    assert "CT2EncDecSLM" in repr(pipe)


def test_the_pipeline_refuses_ids_that_the_model_does_not_have(tmp_path):
    # Exported without a tokenizer, so that any is accepted.
    _, exported = build_pair(tmp_path / "out", vocab_size=94)
    pipe = Text2TextGenerationPipeline(model=exported, tokenizer=build_tokenizer(103))
    with pytest.raises(ValueError, match=r"102.* 93"):
        pipe("w4 w102")


def test_int8_generates_nearly_what_float32_generates(tmp_path):
    model = build_model(hidden_size=128)
    export_ctranslate2(model, tmp_path / "out", "int8")
    exported = CT2EncDecSLM.from_pretrained(tmp_path / "out", intra_threads=1)
    assert exported.translator.compute_type.startswith("int8") and exported.dtype == torch.float32
    ids = build_source(*[9] * 20)["input_ids"]
    first = [each.generate(ids, max_new_tokens=1, eos_token_id=None)[:, 1] for each in (model, exported)]
    # By chance it would be one in a hundred.
    assert (first[0] == first[1]).float().mean() > 0.4


def test_exports_that_ctranslate2_cannot_load_are_refused(one_pair, tmp_path):
    _, _, folder = one_pair
    with pytest.raises(ValueError, match="`device` 'tpu'"):
        CT2EncDecSLM.from_pretrained(folder, device="tpu")
    with pytest.raises(ValueError, match="`compute_type` 'int5'"):
        CT2EncDecSLM.from_pretrained(folder, compute_type="int5")
    copy = shutil.copytree(folder, tmp_path / "copy")
    # Of the right size, but with other content.
    (copy / "model.bin").write_bytes(bytes((copy / "model.bin").stat().st_size))
    with pytest.raises(ValueError, match="CTranslate2 could not load"):
        CT2EncDecSLM.from_pretrained(copy)


def test_ctranslate2_alone_generates_the_same_targets(one_pair):
    model, _, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    for text in ("w14 w22 w33 w44", "w10", "w7 w8"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids[0])
        result = translator.translate_batch([tokens], beam_size=1, max_decoding_length=23, min_decoding_length=0)
        found = tokenizer.convert_tokens_to_ids(result[0].hypotheses[0])
        assert found == [token_id for token_id in model.generate(ids)[0, 1:].tolist() if token_id != 2]
