# SPDX-License-Identifier: Apache-2.0
"""Exports to onnxruntime-genai and OpenVINO GenAI: generation by the engines themselves."""

import itertools

import numpy as np
import pytest
from export_fixtures import SHAPE, SWITCHES, add_end_token, build_batches, generate_rows
from tokenizers import models

from conftest import build_byte_tokenizer, build_model
from encdec_slm.export import export_openvino_genai, export_ort_genai
from encdec_slm.export.engine_bundles import list_eos_token_ids


# torch 2.13's exporter warns about its own calls.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class OrtGenai:
    """onnxruntime-genai. It masks padding on the right only; lengths, also in `length_penalty`, include the source."""

    name, padding_sides, export = "onnxruntime_genai", ("right",), staticmethod(export_ort_genai)

    def __init__(self, folder):
        import onnxruntime_genai

        self.engine = onnxruntime_genai
        self.model = self.engine.Model(str(folder))

    def generate(self, batch, max_new_tokens, on_token=None, **options):
        ids = batch["input_ids"].numpy().astype(np.int32)
        params = self.engine.GeneratorParams(self.model)
        length = ids.shape[1]
        options = {"early_stopping": True, **options}
        params.set_search_options(batch_size=len(ids), max_length=length + max_new_tokens, **options)
        generator = self.engine.Generator(self.model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            if on_token is not None:
                on_token(generator.get_next_tokens()[0])
        return [generator.get_sequence(row)[length:].tolist() for row in range(len(ids))]

    def read(self, text):
        return self.engine.Tokenizer(self.model).encode(text).tolist()


class OpenVINOGenai:
    """OpenVINO GenAI. Version 2026.4.1 mixes up the rows of a batch after one has ended, so that none may."""

    name, padding_sides, export = "openvino_genai", ("left", "right"), staticmethod(export_openvino_genai)

    def __init__(self, folder):
        import openvino
        import openvino_genai

        self.engine, self.openvino = openvino_genai, openvino
        options = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_PRECISION_HINT": "f32"}
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **options)

    def generate(self, batch, max_new_tokens, on_token=None, **options):
        config = self.pipeline.get_generation_config()
        options = {"max_new_tokens": max_new_tokens, "stop_criteria": self.engine.StopCriteria.EARLY, **options}
        if len(batch["input_ids"]) > 1:
            options["ignore_eos"] = True
        for name, value in options.items():
            setattr(config, name, value)
        tensors = [self.openvino.Tensor(batch[name].numpy()) for name in ("input_ids", "attention_mask")]
        arguments = [] if on_token is None else [on_token]
        results = self.pipeline.generate(self.engine.TokenizedInputs(*tensors), config, *arguments)
        return [list(row) for row in results.tokens[: len(batch["input_ids"])]]

    def read(self, text):
        return self.pipeline.get_tokenizer().encode(text).input_ids.data[0].tolist()


@pytest.fixture(scope="module", params=[OrtGenai, OpenVINOGenai], ids=lambda engine: engine.name)
def engine_class(request):
    pytest.importorskip(request.param.name, reason="the engine is not installed: pip install encdec-slm[engines]")
    return request.param


def cut(row, model):
    """Cut a target before its first end token, which OpenVINO does not return."""
    return list(itertools.takewhile(lambda token_id: token_id not in list_eos_token_ids(model), row))


def generate_with_both(engine, model, batch, max_new_tokens, **options):
    """Targets of the engine and of the model, without start and end tokens."""
    beams = {"early_stopping": True} if options else {}
    expected = generate_rows(model, batch, max_new_tokens=max_new_tokens, **beams, **options)
    found = engine.generate(batch, max_new_tokens, **options)
    return [cut(row, model) for row in found], [cut(row[1:], model) for row in expected]


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_the_engine_generates_what_the_model_generates(engine_class, switches, tmp_path):
    model = build_model(**SHAPE, **switches)
    if engine_class is OpenVINOGenai and model.config.qk_norm:
        with pytest.raises(ValueError, match="qk_norm"):
            engine_class.export(model, tmp_path / "out")
        return
    *rows, left, right = build_batches()
    add_end_token(model, right)
    engine = engine_class(engine_class.export(model, tmp_path / "out"))
    padded = [batch for side, batch in (("left", left), ("right", right)) if side in engine_class.padding_sides]
    lengths = set()
    for batch in (*rows, *padded):
        found, expected = generate_with_both(engine, model, batch, 16)
        assert found == expected
        lengths.update(map(len, found))
    assert min(lengths) < 16  # some targets end before the maximum
    for batch in (rows[0], rows[6], rows[-1], *(padded if engine_class is OrtGenai else [])):
        for options in ({"num_beams": beams, "length_penalty": 0.0} for beams in (3, 4)):
            found, expected = generate_with_both(engine, model, batch, 10, **options)
            assert found == expected


@pytest.fixture(scope="module")
def model():
    return build_model(**SHAPE, **SWITCHES["gated"])


@pytest.fixture(scope="module")
def folder(engine_class, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(engine_class.name) / "out"
    return engine_class.export(model, folder, tokenizer=build_byte_tokenizer(ends_sources=False))


def test_texts_are_read_as_by_the_tokenizer_and_targets_are_streamed(engine_class, model, folder):
    engine, tokenizer = engine_class(folder), build_byte_tokenizer(ends_sources=False)
    text = "def area(w):\n    return w  # m², 12.5"
    assert engine.read(text) == tokenizer(text)["input_ids"]
    streamed, batch = [], build_batches()[4]
    (found,) = engine.generate(batch, 9, on_token=lambda part: streamed.append(part) or False)
    assert len(found) == 9
    if engine_class is OrtGenai:
        assert [int(token_id) for token_id in streamed] == found
    else:
        assert "".join(streamed) == engine.pipeline.get_tokenizer().decode(found)


def test_each_quantization_loads_and_generates(engine_class, model, tmp_path):
    batch = build_batches()[4]
    sizes, quantizations = [], ["float16", "int8", "int4"]
    if engine_class is OpenVINOGenai:
        with pytest.raises(ValueError, match=quantizations.pop()):
            engine_class.export(model, tmp_path / "int4", quantization="int4")
    for quantization in quantizations:
        engine = engine_class(engine_class.export(model, tmp_path / quantization, quantization=quantization))
        assert len(engine.generate(batch, 5)[0]) == 5
        sizes.append(sum(path.stat().st_size for path in (tmp_path / quantization).iterdir()))
    assert sizes == sorted(sizes, reverse=True)


def test_a_second_turn_and_a_too_long_source_are_refused(folder):
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai")
    engine = OrtGenai(folder) if (folder / "genai_config.json").is_file() else pytest.skip("only onnxruntime-genai")
    params = onnxruntime_genai.GeneratorParams(engine.model)
    params.set_search_options(max_length=30)
    generator = onnxruntime_genai.Generator(engine.model, params)
    generator.append_tokens(np.array([[9, 8, 7]], np.int32))
    generator.generate_next_token()
    with pytest.raises(RuntimeError):
        generator.append_tokens(np.array([[9, 8, 7]], np.int32))
    with pytest.raises(RuntimeError, match="31"):
        onnxruntime_genai.Generator(engine.model, params).append_tokens(np.ones((1, 31), np.int32))
    too_long = onnxruntime_genai.GeneratorParams(engine.model)
    with pytest.raises(RuntimeError, match="context_length"):
        too_long.set_search_options(max_length=SHAPE["max_position_embeddings"] + 1)
        onnxruntime_genai.Generator(engine.model, too_long)


def test_a_stop_string_ends_a_target(folder, model):
    if not (folder / "openvino_model.xml").is_file():
        pytest.skip("onnxruntime-genai has no stop strings")
    engine, batch = OpenVINOGenai(folder), build_batches()[4]
    (ids,) = engine.generate(batch, 12)
    stop = engine.pipeline.get_tokenizer().decode(ids[4:5])
    (stopped,) = engine.generate(batch, 12, stop_strings={stop}, include_stop_str_in_output=True)
    assert stopped == ids[: len(stopped)] and len(stopped) <= 5


def test_a_tokenizer_that_the_engine_reads_otherwise_is_refused_and_nothing_is_written(engine_class, model, tmp_path):
    if engine_class is OpenVINOGenai:
        pytest.skip("OpenVINO converts tokenizers of words")
    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.model = models.WordLevel(tokenizer.get_vocab(), unk_token="<unk>")
    with pytest.raises(ValueError, match="tokenizer"):
        engine_class.export(model, tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
