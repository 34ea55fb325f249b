# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest

from encdec_slm.benchmarks.contenders import FLAN_T5, OURS, T5GEMMA2, TWIN, Contender
from encdec_slm.benchmarks.engines import TORCH_ENGINES, bundle_folder, import_engine, load, prepare
from encdec_slm.benchmarks.measuring import file_bytes


for name in ("ctranslate2", "onnxruntime", "openvino"):
    pytest.importorskip(name)

# torch 2.13's exporter warns of what it calls itself.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def contender(model, engine, precision):
    return Contender(model, engine, precision, "cpu", "tiny")


def timed(one, folder, source_ids=(5, 6, 7, 8), num_new_tokens=6):
    if one.engine not in TORCH_ENGINES and not bundle_folder(one, folder).exists():
        prepare(one, folder)
    import_engine(one, num_threads=1)
    return load(one, bundle_folder(one, folder), num_threads=1)(list(source_ids), num_new_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


@pytest.mark.parametrize("model", [OURS, TWIN])
@pytest.mark.parametrize("engine", ["transformers", "ctranslate2/float32", "ctranslate2/int8"])
def test_every_new_token_is_timed(model, engine, folder):
    engine, _, precision = engine.partition("/")
    seconds = timed(contender(model, engine, precision or "float32"), folder)
    assert len(seconds) == 6
    assert seconds[0] > 0 and all(earlier < later for earlier, later in itertools.pairwise(seconds))


@pytest.mark.slow
@pytest.mark.parametrize("model", [OURS, TWIN])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_graphs_are_timed_in_both_engines(model, precision, folder):
    for engine in ("onnxruntime", "openvino"):
        assert len(timed(contender(model, engine, precision), folder)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("model", [OURS, TWIN])
def test_a_compiled_step_is_timed(model, folder):
    assert len(timed(contender(model, "transformers-compiled", "float32"), folder)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("model", [T5GEMMA2, FLAN_T5])
def test_peers_are_timed(model, folder):
    assert len(timed(contender(model, "ctranslate2", "int8"), folder, num_new_tokens=3)) == 3


def test_engines_that_read_the_same_files_share_them(folder):
    onnxruntime, openvino = (contender(OURS, engine, "float32") for engine in ("onnxruntime", "openvino"))
    compressed = contender(OURS, "openvino", "int8")
    assert len({bundle_folder(one, folder) for one in (onnxruntime, openvino, compressed)}) == 1
    assert bundle_folder(contender(OURS, "onnxruntime", "int8"), folder) != bundle_folder(onnxruntime, folder)


def test_int8_files_are_a_quarter_of_float32_ones(folder):
    sizes = []
    for precision in ("float32", "int8"):
        one = contender(TWIN, "ctranslate2", precision)
        if not bundle_folder(one, folder).exists():
            prepare(one, folder)
        sizes.append((bundle_folder(one, folder) / "model.bin").stat().st_size)
    assert 0.24 < sizes[1] / sizes[0] < 0.32
    assert file_bytes(bundle_folder(one, folder)) > sizes[1]
