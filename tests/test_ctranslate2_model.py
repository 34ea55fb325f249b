# SPDX-License-Identifier: Apache-2.0
"""A CTranslate2 model writes what the exported model writes: greedy, with beams, padded, streamed, in threads."""

import copy
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import ctranslate2
import pytest
import torch
from test_pipeline_encdec_slm import build_tokenizer
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

from conftest import randomised
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration, Text2TextGenerationPipeline
from encdec_slm.export import CT2EncDecSLM, export_ctranslate2
from encdec_slm.export.bundles import MANIFEST


SIZES = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "max_position_embeddings": 24},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "lm_head_bias": True},
    **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "predecessor": {"hidden_act": "gelu_pytorch_tanh", "gated_mlp": False, "attention_bias": True, "mlp_bias": True}
    | {"eos_bias": 3.5},
    "smollm3": {"encoder_no_rope_layers": [0, 1], "decoder_no_rope_layers": [1, 0]},
}
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w10 w11", "", "what nobody knows"]


def build_pair(folder, seed=0, eos_bias=2.0, tokenizer=None, **switches):
    """A model, in which targets end now and then, and its float32 export."""
    model = randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**SIZES, **switches})), seed).eval()
    with torch.no_grad():
        model.lm_head.bias[2] = eos_bias
        model.lm_head.bias[93:] = -100.0  # rows beyond the tokenizer
    export_ctranslate2(model, folder, "float32", tokenizer=tokenizer)
    return model, CT2EncDecSLM.from_pretrained(folder, intra_threads=1)


def padded_sources(lengths, side="right", seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 93, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return build_pair(tmp_path_factory.mktemp("ct2") / "out", tokenizer=build_tokenizer(), **FAMILIES[request.param])


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct2") / "out"
    return *build_pair(folder, seed=3, tokenizer=build_tokenizer()), folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_targets_of_padded_batches_are_those_of_the_model(pair, side):
    model, exported = pair
    sources = padded_sources([40, 1, 7, 12, 2, 9], side)
    expected = model.generate(**sources)
    assert torch.equal(exported.generate(**sources), expected)
    # Some ended earlier than others.
    assert (expected == 2).any()
    assert (expected[:, -1] == 0).any()
    single = [exported.generate(ids[mask.bool()][None]) for ids, mask in zip(*sources.values(), strict=True)]
    rows = [row[: len(alone[0])] for row, alone in zip(expected, single, strict=True)]
    assert all(torch.equal(row, alone[0]) for row, alone in zip(rows, single, strict=True))


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
        {"num_beams": None, "do_sample": False, "use_cache": True, "bad_words_ids": None, "stop_strings": None},
    ],
    ids=str,
)
def test_generation_settings_do_what_they_do_in_transformers(one_pair, settings):
    model, exported, _ = one_pair
    sources = padded_sources([9, 5, 3, 14])
    wanted = {name: value for name, value in settings.items() if name != "num_beams" or value is not None}
    assert torch.equal(exported.generate(**sources, **settings), model.generate(**sources, **wanted))


def test_the_defaults_of_the_generation_config_are_exported(tmp_path):
    model = randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**SIZES))).eval()
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "eos_token_id": [5, 2]}
    model.generation_config.update(**settings, early_stopping=True)
    export_ctranslate2(model, tmp_path / "out", "float32")
    exported = CT2EncDecSLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.to_dict() == model.generation_config.to_dict()
    sources = padded_sources([5, 8])
    assert torch.equal(exported.generate(**sources), model.generate(**sources))
    exported.generation_config.max_new_tokens = 3
    assert exported.generate(**sources).shape == (4, 4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 1.0), (4, 1.0), (4, 0.0), (3, -0.5)])
def test_beams_and_their_scores_are_those_of_transformers(seed, num_beams, length_penalty, tmp_path):
    model, exported = build_pair(tmp_path / "out", seed, eos_bias=seed / 2)
    sources = padded_sources([11, 4, 1, 7], "left", seed)
    settings = {"num_beams": num_beams, "num_return_sequences": num_beams, "length_penalty": length_penalty}
    for early_stopping in (False, True):
        settings |= {"early_stopping": early_stopping, "max_new_tokens": 16, "return_dict_in_generate": True}
        expected = model.generate(**sources, **settings, output_scores=True)
        found = exported.generate(**sources, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        # Scores are divided and multiplied by powers of lengths, down to `16 ** 0.5` times a sum of 16 terms.
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=2e-4, rtol=1e-5)


def test_stopping_early_and_searching_on_are_told_apart(tmp_path):
    # Else the test above would not show that both are followed.
    model, exported = build_pair(tmp_path / "out", 1, eos_bias=2.5)
    sources = padded_sources([11, 4, 1, 7, 5, 6, 8, 9])
    settings = {"num_beams": 4, "max_new_tokens": 16, "length_penalty": 2.0}
    early, late = (exported.generate(**sources, **settings, early_stopping=stop) for stop in (True, False))
    assert early.shape != late.shape or not torch.equal(early, late)
    assert torch.equal(late, model.generate(**sources, **settings))
    assert torch.equal(early, model.generate(**sources, **settings, early_stopping=True))


def test_beams_of_several_ends_of_text_are_those_of_transformers(one_pair):
    model, exported, _ = one_pair
    sources = padded_sources([9, 5, 3])
    settings = {"num_beams": 3, "eos_token_id": [2, 5, 40], "pad_token_id": 0, "num_return_sequences": 3}
    assert torch.equal(exported.generate(**sources, **settings), model.generate(**sources, **settings))


def test_sources_that_ctranslate2_takes_for_empty_are_read(one_pair):
    model, exported, _ = one_pair
    for row in ([2], [1], [1, 2], [2, 7], [2, 2], [0], [3, 3, 3], [96]):
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        assert torch.equal(exported.generate(ids, mask), model.generate(ids, attention_mask=mask)), row


def test_everything_is_read_without_a_mask_as_in_transformers(one_pair):
    model, exported, _ = one_pair
    ids = padded_sources([9, 5, 3], "left")["input_ids"]
    assert torch.equal(exported.generate(ids), model.generate(ids))


def test_ids_come_back_as_whole_numbers_of_64_bits_in_a_dict_if_asked(one_pair):
    _, exported, _ = one_pair
    ids = torch.tensor([[5, 6, 2]], dtype=torch.int32)
    output = exported.generate(ids, return_dict_in_generate=True)
    assert output.sequences.dtype == torch.int64
    assert torch.equal(output.sequences, exported.generate(ids))
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
    # Of 4000 draws a share is off by 0.008 in one of two cases.
    torch.testing.assert_close(drawn.bincount(minlength=97) / 4000, expected, atol=0.04, rtol=0)
    assert len(exported.generate(ids, num_return_sequences=50, do_sample=True, top_k=500).unique(dim=0)) > 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"typical_p": 0.5, "bad_words_ids": [[4]]}, r"`typical_p` \(0.5\), `bad_words_ids` \(\[\[4\]\]\) cannot be"),
        ({"decoder_input_ids": torch.tensor([[1, 5]])}, "`decoder_input_ids`"),
        ({"decoder_start_token_id": 7}, r"`decoder_start_token_id` \(7\)"),
        ({"output_scores": True}, r"`output_scores` \(True\)"),
        ({"no_such_setting": 1}, r"`no_such_setting` \(1\)"),
        ({"generation_config": GenerationConfig(suppress_tokens=[4])}, "`suppress_tokens`"),
        ({"num_beams": 2, "early_stopping": "never"}, "`early_stopping` is 'never'"),
        ({"num_beams": 2, "repetition_penalty": 1.2}, "`repetition_penalty` cannot be honoured together"),
        ({"num_beams": 2, "do_sample": True, "min_length": 4}, "`do_sample`, `min_new_tokens` cannot be honoured"),
        ({"num_return_sequences": 2}, r"`num_return_sequences` \(2\) is more than `num_beams` \(1\)"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` is 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "`top_p` 1.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(one_pair, settings, message):
    with pytest.raises(ValueError, match=message):
        one_pair[1].generate(torch.tensor([[5, 6]]), **settings)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 97]], None, "ids from 5 to 97, but the vocabulary has ids 0 to 96"),
        ([[-1, 5]], None, "ids from -1 to 5"),
        ([5, 6], None, r"`input_ids` is \(2,\)"),
        ([[5.0, 6.0]], None, r"`input_ids` is \(1, 2\)"),
        ([[5, 6], [7, 8]], [[1, 1], [0, 0]], "Source 1 .* has no token that is read"),
        ([[5, 6, 7]], [[1, 0, 1]], "Source 0 .* has tokens that are not read between others"),
        ([[5, 6, 7]], [[1, 1]], r"`attention_mask` has shape \(1, 2\)"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(one_pair, ids, mask, message):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        one_pair[1].generate(torch.tensor(ids), mask)


class Recorder:
    """A streamer that keeps what it gets, and for whom that waits."""

    def __init__(self, on_token=lambda: None):
        self.received, self.has_ended, self.on_token = [], False, on_token

    def put(self, value):
        self.received.append(value)
        self.on_token()

    def end(self):
        self.has_ended = True


def test_a_streamer_gets_what_it_gets_from_transformers(one_pair):
    model, exported, _ = one_pair
    for ids in (torch.tensor([[5, 6, 7, 2]]), torch.tensor([[11, 2]])):
        expected, found = Recorder(), Recorder()
        model.generate(ids, streamer=expected)
        target = exported.generate(ids, streamer=found)
        assert [value.tolist() for value in found.received] == [value.tolist() for value in expected.received]
        assert found.has_ended
        assert target[0].tolist() == [value.flatten()[0].item() for value in found.received]


def test_tokens_are_streamed_while_the_rest_is_being_written(one_pair):
    _, exported, _ = one_pair
    # The engine is at work in its own thread when the reader has the first token.
    active = []
    streamer = Recorder(lambda: active.append(exported.translator.num_active_batches))
    exported.generate(torch.tensor([[5, 6, 7, 2]]), streamer=streamer, eos_token_id=None, max_new_tokens=3000)
    assert len(streamer.received) == 3001
    assert active[1] == 1


def test_a_reader_who_stops_stops_the_engine(one_pair):
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


def test_streamed_text_comes_piece_by_piece_to_transformers_streamers(one_pair, capsys):
    _, exported, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(exported.generate(ids)[0], skip_special_tokens=True)
    exported.generate(ids, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == f"{expected}\n"
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    thread = threading.Thread(target=exported.generate, args=(ids,), kwargs={"streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 1


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_only_one_target_is_streamed(one_pair, settings):
    with pytest.raises(ValueError, match="only one target is streamed"):
        one_pair[1].generate(torch.tensor([[5, 6]]), streamer=Recorder(), **settings)
    with pytest.raises(ValueError, match="with 2 sources"):
        one_pair[1].generate(torch.tensor([[5, 6], [7, 8]]), streamer=Recorder())


@pytest.mark.parametrize("inter_threads", [1, 3])
def test_requests_of_several_threads_get_what_each_gets_alone(one_pair, inter_threads):
    _, alone, folder = one_pair
    shared = CT2EncDecSLM.from_pretrained(folder, inter_threads=inter_threads, intra_threads=1)
    assert shared.translator.num_translators == inter_threads
    sources = [torch.randint(3, 93, (1, 3 + n), generator=torch.Generator().manual_seed(n)) for n in range(12)]
    options = [{}, {"num_beams": 3}, {"streamer": None}]

    def ask(number):
        settings = dict(options[number % 3])
        if "streamer" in settings:
            settings["streamer"] = Recorder()
        return shared.generate(sources[number], **settings)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(ask, range(12)))
    for number, (ids, target) in enumerate(zip(sources, found, strict=True)):
        assert torch.equal(target, alone.generate(ids, num_beams=3 if number % 3 == 1 else 1))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"return_tensors": True}], ids=str
)
def test_our_pipeline_takes_it_as_it_takes_the_model(one_pair, options):
    model, exported, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = Text2TextGenerationPipeline(model=model, tokenizer=build_tokenizer())(TEXTS, batch_size=3, **options)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        pipe = Text2TextGenerationPipeline(model=exported, tokenizer=tokenizer)
        found = pipe(TEXTS, batch_size=3, **options)
        assert str(found) == str(expected)
    assert str(next(iter(pipe((text for text in TEXTS), **options)))) == str(pipe(TEXTS[0], **options))
    assert "CT2EncDecSLM" in repr(pipe)


def test_the_pipeline_function_takes_it_too(one_pair):
    _, exported, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = pipeline(
        "text2text-generation",
        model=exported,
        tokenizer=tokenizer,
        pipeline_class=Text2TextGenerationPipeline,
        config=copy.deepcopy(exported.config),
    )
    assert pipe(TEXTS[0]) == Text2TextGenerationPipeline(model=exported, tokenizer=tokenizer)(TEXTS[0])


def test_the_pipeline_refuses_another_tokenizer(one_pair):
    _, exported, _ = one_pair
    other = build_tokenizer()
    other.add_tokens(["one more"])
    with pytest.raises(ValueError, match=r"The tokenizer .* is not that of the exported model"):
        Text2TextGenerationPipeline(model=exported, tokenizer=other)


def test_the_pipeline_refuses_ids_that_the_model_does_not_have(tmp_path):
    # Exported without a tokenizer, so that none is known to be the right one.
    _, exported = build_pair(tmp_path / "out", vocab_size=94)
    other = build_tokenizer()
    other.add_tokens([f"more{number}" for number in range(9)])
    pipe = Text2TextGenerationPipeline(model=exported, tokenizer=other)
    with pytest.raises(ValueError, match="made token id 102, but the model has ids 0 to 93"):
        pipe("w1 more8")


def test_it_says_what_it_is(one_pair):
    model, exported, folder = one_pair
    assert exported.config.to_dict() | {"custom_pipelines": None} == model.config.to_dict() | {
        "custom_pipelines": None
    }
    assert exported.device == torch.device("cpu")
    assert exported.dtype == torch.float32
    assert exported.can_generate()
    assert exported.to("cpu") is exported
    assert CT2EncDecSLM.from_pretrained(str(folder), compute_type="int8").translator.compute_type == "int8_float32"
    with pytest.raises(ValueError, match="`device` is 'cuda:0', but a loaded CTranslate2 model stays"):
        exported.to("cuda:0")


def test_int8_writes_nearly_what_float32_writes(tmp_path):
    model = randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**SIZES, "hidden_size": 128}))).eval()
    export_ctranslate2(model, tmp_path / "out", "int8")
    exported = CT2EncDecSLM.from_pretrained(tmp_path / "out", intra_threads=1)
    assert exported.translator.compute_type.startswith("int8")
    ids = torch.randint(3, 93, (20, 9), generator=torch.Generator().manual_seed(0))
    first = [each.generate(ids, max_new_tokens=1, eos_token_id=None) for each in (model, exported)]
    # By chance it would be one in a hundred.
    assert (first[0][:, 1] == first[1][:, 1]).float().mean() > 0.4


def test_folders_that_are_no_such_export_are_refused(one_pair, tmp_path):
    _, _, folder = one_pair
    with pytest.raises(ValueError, match=f"has no {MANIFEST} that can be read"):
        CT2EncDecSLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load .* with `device` 'tpu'"):
        CT2EncDecSLM.from_pretrained(folder, device="tpu")
    with pytest.raises(ValueError, match="`compute_type` 'int5'"):
        CT2EncDecSLM.from_pretrained(folder, compute_type="int5")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=r"model\.bin of .* has 5,000 bytes, but was written with"):
        CT2EncDecSLM.from_pretrained(tmp_path)
    # Of the right length, but not what CTranslate2 reads.
    (tmp_path / "model.bin").write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="CTranslate2 cannot load"):
        CT2EncDecSLM.from_pretrained(tmp_path)


def test_the_plain_engine_gives_the_same_targets(one_pair):
    model, _, folder = one_pair
    tokenizer = AutoTokenizer.from_pretrained(folder)
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    for text in ("w1 w2 w3 w4", "w10", "w7 w8"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids[0])
        result = translator.translate_batch([tokens], beam_size=1, max_decoding_length=23, min_decoding_length=0)
        found = tokenizer.convert_tokens_to_ids(result[0].hypotheses[0])
        assert found == [token_id for token_id in model.generate(ids)[0, 1:].tolist() if token_id != 2]


def test_the_manifest_of_the_folder_holds_the_configs(one_pair):
    model, _, folder = one_pair
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == "ctranslate2"
    assert manifest["quantization"] == "float32"
    assert manifest["config"]["model_type"] == "encdec_slm"
    assert manifest["generation_config"] == model.generation_config.to_dict()
    assert {"model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json"} <= manifest["files"].keys()
