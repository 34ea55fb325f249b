# SPDX-License-Identifier: Apache-2.0
import itertools
from importlib.util import find_spec

import pytest

from encdec_slm.benchmarks.contenders import BASELINE, FLAN_T5, OURS, T5GEMMA2, TORCH_ENGINES, Contender
from encdec_slm.benchmarks.engines import find_bundle_folder, load, prepare


for name in ("ctranslate2", "onnxruntime", "openvino"):
    pytest.importorskip(name)

# torch 2.13's exporter warns about its own calls.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def contender(model, engine, precision):
    return Contender(model, engine, precision, "cpu", "tiny")


def time_contender(one, folder, num_new_tokens=6):
    bundle = find_bundle_folder(one, folder)
    if one.engine not in TORCH_ENGINES and not bundle.exists():
        prepare(one, folder)
    return load(one, bundle, num_threads=1)([5, 6, 7, 8], num_new_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


@pytest.mark.parametrize("model", [OURS, BASELINE])
@pytest.mark.parametrize(
    ("engine", "precision"), [("transformers", "float32"), ("ctranslate2", "float32"), ("ctranslate2", "int8")]
)
def test_each_new_token_is_timed(model, engine, precision, folder):
    seconds = time_contender(contender(model, engine, precision), folder)
    assert len(seconds) == 6
    assert seconds[0] > 0 and all(earlier < later for earlier, later in itertools.pairwise(seconds))


@pytest.mark.slow
@pytest.mark.parametrize("model", [OURS, BASELINE])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_graphs_are_timed_in_both_engines(model, precision, folder):
    for engine in ("onnxruntime", "onnxruntime_genai", "openvino"):
        if engine == "onnxruntime_genai" and (precision == "float32" or not find_spec(engine)):
            continue
        assert len(time_contender(contender(model, engine, precision), folder)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("model", [OURS, BASELINE])
def test_a_compiled_step_is_timed(model, folder):
    assert len(time_contender(contender(model, "transformers-compiled", "float32"), folder)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("model", [T5GEMMA2, FLAN_T5])
def test_peers_are_timed(model, folder):
    assert len(time_contender(contender(model, "ctranslate2", "int8"), folder, num_new_tokens=3)) == 3


def test_engines_that_read_the_same_files_share_them(folder):
    onnxruntime, openvino = (contender(OURS, engine, "float32") for engine in ("onnxruntime", "openvino"))
    compressed, quantized = contender(OURS, "openvino", "int8"), contender(OURS, "onnxruntime", "int8")
    assert len({find_bundle_folder(one, folder) for one in (onnxruntime, openvino, compressed)}) == 1
    assert find_bundle_folder(quantized, folder) != find_bundle_folder(onnxruntime, folder)


def test_int8_files_are_a_quarter_of_float32_ones(folder):
    sizes = []
    for precision in ("float32", "int8"):
        one = contender(BASELINE, "ctranslate2", precision)
        time_contender(one, folder)
        sizes.append((find_bundle_folder(one, folder) / "model.bin").stat().st_size)
    assert 0.24 < sizes[1] / sizes[0] < 0.32
