# SPDX-License-Identifier: Apache-2.0
import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from conftest import build_model, build_tokenizer
from encdec_slm.export.bundles import import_engine


TEXT = (Path(__file__).parent.parent / "docs" / "devices.md").read_text(encoding="utf-8")
# The package that a snippet needs, if any, and its code.
SNIPPETS = re.findall(r"^```python(?: needs (\w+))?\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_snippets_are_python():
    assert len(SNIPPETS) == TEXT.count("```python") == 6
    for _, code in SNIPPETS:
        ast.parse(code)


def test_files_and_options_that_the_text_names_exist():
    names = {path.name for path in (Path(__file__).parent.parent / "modeling_encdec_slm" / "export").iterdir()}
    assert set(re.findall(r"encdec_slm/export/(\w+\.py)", TEXT)) <= names


@pytest.mark.slow
def test_snippets_that_need_no_device_run_and_generate_what_the_model_generates(tmp_path, monkeypatch, capsys):
    model = build_model(encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "outputs" / "model")
    build_tokenizer().save_pretrained(tmp_path / "outputs" / "model")
    monkeypatch.chdir(tmp_path)
    namespace = {"onnxruntime": import_engine("onnxruntime"), "openvino": import_engine("openvino")}
    for needed, code in SNIPPETS:
        if not needed or importlib.util.find_spec(needed) is not None:
            exec(compile(code, "docs/devices.md", "exec"), namespace)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=64)[0].tolist()
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert printed and all(ids == expected for ids in printed)
    for kind in ("OrtEncDecSLM", "OpenVINOEncDecSLM"):
        runtime = namespace[kind].from_pretrained("outputs/npu")
        assert runtime.generate(torch.tensor([[5, 6, 7]]))[0].tolist() == expected
