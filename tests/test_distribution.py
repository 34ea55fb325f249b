# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the wheel and the sdist carry the code and the data, under one import name."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, built from a copy so that no build folder stays behind."""
    tree, output = tmp_path_factory.mktemp("tree") / "encdec-slm", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(tree)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


def packaged_data():
    """Data files of the source folders, as paths below `encdec_slm`."""
    files = [Path("py.typed")]
    for folder, pattern in (("configuration", "*/*.json"), ("configuration", "*/*.yaml"), ("hub_cards", "*.md")):
        found = [path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern)]
        assert found, f"{folder}/{pattern} names no file"
        files += found
    return [f"encdec_slm/{path.as_posix()}" for path in files]


def test_the_wheel_carries_every_module_and_data_file(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(packaged_data()) <= names
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"encdec_slm", "encdec_slm_cli", "encdec_slm_vllm"}
    folders = {"modeling_encdec_slm": "", "configuration": "configuration/", "trainers": "trainers/"}
    for folder, prefix in {**folders, "hub_cards": "hub_cards/"}.items():
        modules = {f"encdec_slm/{prefix}{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert modules <= names


def test_the_sdist_builds_the_same_data(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {name.removeprefix("encdec_slm/") for name in packaged_data()} - {"py.typed"}
    assert sources | {"setup.cfg", "pyproject.toml", "LICENSE", "modeling_encdec_slm/py.typed"} <= names


def test_the_wheel_imports_from_where_it_is_installed(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import encdec_slm; "
        "from encdec_slm.configuration import list_presets, load_preset; "
        "assert encdec_slm.__file__.startswith(sys.argv[1]), encdec_slm.__file__; "
        "print(load_preset('tiny').model_type, len(list_presets()))"
    )
    # -S keeps the editable install of this checkout out of the way; its site-packages are added back by hand.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({site!r}); {script}", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.stdout.startswith("encdec_slm "), run.stderr
