# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
)

import encdec_slm
from encdec_slm.configuration import load_preset


ROOT = Path(__file__).parent.parent


def test_all_equals_the_public_names():
    public = {name for name, value in vars(encdec_slm).items() if not name.startswith("_")}
    modules = {name for name in public if type(getattr(encdec_slm, name)) is type(encdec_slm)}
    imported_to_register = {name for name in public if name.startswith("Auto")}
    assert public - modules - imported_to_register == set(encdec_slm.__all__)


def test_importing_registers_every_auto_class(tiny_config):
    assert type(AutoConfig.for_model("encdec_slm")) is encdec_slm.EncDecSLMConfig
    assert type(AutoModel.from_config(tiny_config)) is encdec_slm.EncDecSLMModel
    assert type(AutoModelForSeq2SeqLM.from_config(tiny_config)) is encdec_slm.EncDecSLMForConditionalGeneration
    assert type(AutoModelForTextEncoding.from_config(tiny_config)) is encdec_slm.EncDecSLMEncoderModel
    vision_config = load_preset("tiny-vlm")
    assert type(AutoConfig.for_model("encdec_vlm")) is encdec_slm.EncDecVLMConfig
    assert type(AutoModel.from_config(vision_config)) is encdec_slm.EncDecVLMModel
    for auto_class in (AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto_class.from_config(vision_config)) is encdec_slm.EncDecVLMForConditionalGeneration


@pytest.mark.parametrize("folder", ["modeling_encdec_slm"])
def test_the_package_has_one_name_only(folder):
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Import this package as `encdec_slm`" in run.stderr
