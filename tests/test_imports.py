# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: models <- configuration <- trainers <- command line, with three leaves beside trainers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
# Where the packages lie, the longest names first.
FOLDERS = {
    "encdec_slm_cli": ROOT / "modeling_encdec_slm" / "cli",
    "encdec_slm_vllm": ROOT / "modeling_encdec_slm" / "vllm",
    "encdec_slm.configuration": ROOT / "configuration",
    "encdec_slm.trainers": ROOT / "trainers",
    "encdec_slm.hub_cards": ROOT / "hub_cards",
    "encdec_slm": ROOT / "modeling_encdec_slm",
}
LEAVES = ("export", "benchmarks", "hub_cards")
MAY_IMPORT = {
    "models": ("models",),
    "configuration": ("models", "configuration"),
    "trainers": ("models", "configuration", "trainers"),
    **{leaf: ("models", "configuration", leaf) for leaf in LEAVES},
    "benchmarks": ("models", "configuration", "export", "benchmarks"),  # they time the exports
    "cli": ("models", "configuration", "trainers", "cli", *LEAVES),
    "vllm": ("models", "vllm"),
}
CORE = {"torch", "numpy", "PIL", "transformers", "huggingface_hub"}
INSTALLED = {*CORE, "safetensors", "tokenizers", "yaml", "typer", "filelock", "jinja2", "tqdm"}
# pyarrow and pandas come with datasets.
TRAIN = {"accelerate", "datasets", "matplotlib", "pandas", "peft", "pyarrow", "rouge_score", "sklearn", "trl"}
EXPORT = {"ctranslate2", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "torchao"}
PACKAGES = {
    "models": INSTALLED | {"peft"},
    "configuration": INSTALLED | {"trl"},
    "trainers": INSTALLED | TRAIN | {"sacrebleu", "scipy"},
    "export": INSTALLED | EXPORT,
    "benchmarks": INSTALLED | EXPORT | {"matplotlib"},
    "hub_cards": INSTALLED | {"gradio"},
    "cli": INSTALLED | {"trl", "ctranslate2"},
    "vllm": INSTALLED | {"vllm"},
}
SHIPPED = sorted(
    path.stem for path in FOLDERS["encdec_slm"].glob("*_encdec_*.py") if path.stem.endswith(("_slm", "_vlm"))
)


def module_names():
    """The path of every module, by its name."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            if path not in modules.values():
                parts = path.relative_to(folder).with_suffix("").parts
                modules[".".join([package, *parts]).removesuffix(".__init__")] = path
    return modules


MODULES = module_names()


def layer(module):
    if module.startswith(("encdec_slm_cli", "encdec_slm_vllm")):
        return module.split(".")[0].removeprefix("encdec_slm_")
    part = module.split(".")[1] if "." in module else ""
    return part if part in MAY_IMPORT else "models"


def imports(module):
    """Names of all modules that a module imports, inside of functions too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            submodules = [f"{name}.{alias.name}" for alias in node.names]
            yield from [one if one in MODULES else name for one in submodules]


def test_imports_point_one_way():
    wrong = {
        (module, layer(imported))
        for module in MODULES
        for imported in imports(module)
        if imported in MODULES and layer(imported) not in MAY_IMPORT[layer(module)]
    }
    assert sorted(wrong) == []


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_layer_needs_only_the_packages_of_its_extra(name):
    allowed = PACKAGES[name] | sys.stdlib_module_names
    wrong = {
        (module, imported)
        for module in MODULES
        if layer(module) == name
        for imported in imports(module)
        if imported not in MODULES and imported.partition(".")[0] not in allowed
    }
    assert sorted(wrong) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_files_that_ship_import_only_core_packages_and_each_other(name):
    path = FOLDERS["encdec_slm"] / f"{name}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= CORE | sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in SHIPPED
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] in CORE | sys.stdlib_module_names


def test_importing_the_package_loads_no_optional_package():
    code = "import sys, encdec_slm; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0] for module in run.stdout.split()}
    # Those that torch and transformers load where they are installed.
    known = {"accelerate", "pandas", "pyarrow", "sklearn", "torchao"}
    assert loaded & (TRAIN | EXPORT | {"gradio"}) <= known


WITHOUT_PACKAGES = """
import importlib.util, sys
missing, find_spec = set(sys.argv[1].split(",")), importlib.util.find_spec
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in missing else find_spec(name, *rest)
from encdec_slm_cli import main
sys.exit(main(sys.argv[2:]))
"""
OTHERS = {"gradio", "lm_eval", "sacrebleu", "scipy", "tensorboard"}
TRAINING = "--train_file {rows} --preset tiny --vocab_size 300 --max_steps 1 --max_eval_samples 2 --use_cpu true"
COMMANDS = {
    "generate": ("generate {model} text --max-new-tokens 3", TRAIN | EXPORT | OTHERS),
    "publish": ("publish {model} {out}", TRAIN | EXPORT | OTHERS),
    "export": ("export {model} {out}", (TRAIN | EXPORT | OTHERS) - {"ctranslate2"}),
    "export onnx": (
        "export {model} {out} --format onnx --quantization int8",
        (TRAIN | EXPORT | OTHERS) - {"onnx", "onnxscript", "onnxruntime"},
    ),
    "shell": ("shell text --model {model}", (TRAIN | EXPORT | OTHERS) - {"ctranslate2"}),
    "finetune": ("finetune --output_dir {out} --report_to none " + TRAINING, EXPORT | OTHERS),
    "evaluate": ("evaluate {model} --task text --dataset-name {rows} --max-samples 1", EXPORT | OTHERS),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_needs_only_the_packages_of_its_extra(command, text_folder, tmp_path):
    line, missing = COMMANDS[command]
    (tmp_path / "rows.jsonl").write_text('{"source": "a", "target": "b"}\n' * 20, encoding="utf-8")
    places = {"model": text_folder, "out": tmp_path / "out", "rows": tmp_path / "rows.jsonl"}
    arguments = [word.format(**places) for word in line.split()]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, ",".join(missing), *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
