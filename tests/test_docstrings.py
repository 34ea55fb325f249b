# SPDX-License-Identifier: Apache-2.0
"""The docstring task on small folders with known rows, and on the standard library."""

import ast

import pytest

from encdec_slm.trainers.tasks.docstrings import SPLITS, build_docstring_task, first_sentence, split_of


# One name per split, by the fixed hash.
MODULES = {"train": "alpha", "validation": "echo", "test": "bravo"}


def write_module(folder, name, text):
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def documented(name, docstring="Return the number of rows in use."):
    return f'def {name}(self):\n    """{docstring}"""\n    return self.{name}\n'


@pytest.fixture
def folder(tmp_path):
    for split, module in MODULES.items():
        write_module(tmp_path, module, documented(f"rows_in_{split}"))
    return tmp_path


def build_rows(folder, split="train"):
    return {row["name"]: row for row in build_docstring_task(folder)[split]}


def test_the_modules_of_these_tests_belong_to_their_splits():
    assert {split: split_of(module) for split, module in MODULES.items()} == {split: split for split in SPLITS}


def test_a_row_has_the_source_without_docstring_the_first_sentence_and_the_dotted_name(folder):
    text = 'class Store:\n    @property\n    def size(self):\n        """Return the size. It\n        is cheap."""\n'
    write_module(folder, "alpha/store", text + "        return len(self.rows)\n")
    assert build_rows(folder)["alpha.store.Store.size"] == {
        "source": "@property\ndef size(self):\n    return len(self.rows)",
        "target": "Return the size.",
        "name": "alpha.store.Store.size",
    }


def test_docstrings_of_nested_functions_are_removed(folder):
    inner = '    def inner():\n        """Return one and only one."""\n        return 1\n'
    write_module(folder, "alpha", f'def outer():\n    """Return the inner function."""\n{inner}    return inner\n')
    assert (
        build_rows(folder)["alpha.outer"]["source"]
        == "def outer():\n    def inner():\n        return 1\n    return inner"
    )
    assert set(build_rows(folder)) == {"alpha.outer", "alpha.outer.inner"}


@pytest.mark.parametrize(
    "function",
    [
        'def f():\n    """Return nothing of any use."""\n',
        'def f(): "Return nothing of any use."\n',
        'def f(x):\n    """f(x) -> a number of rows"""\n    return x\n',
        'def f(x):\n    """Two words."""\n    return x\n',
        'def f(x):\n    """Return the number x."""\n    # Return the number x.\n    return x\n',
        "def f(x):\n    return x\n",
    ],
    ids=["nothing but a docstring", "one line", "a signature", "two words", "quoted in a comment", "undocumented"],
)
def test_functions_without_a_sentence_or_a_body_are_left_out(folder, function):
    write_module(folder, "alpha", documented("kept") + function)
    assert set(build_rows(folder)) == {"alpha.kept"}


def test_test_folders_and_files_that_do_not_parse_are_left_out(folder):
    for name in ("test/alpha", "alpha/tests/cases", "site-packages/alpha"):
        write_module(folder, name, documented(f"from_{name.split('/')[0].replace('-', '_')}"))
    write_module(folder, "broken", "def f(:\n")
    assert set(build_rows(folder)) == {"alpha.rows_in_train"}


def test_equal_code_is_used_once_in_all_splits(folder):
    write_module(folder, MODULES["test"], documented("rows_in_train") + documented("rows_in_test"))
    assert set(build_rows(folder, "test")) == {f"{MODULES['test']}.rows_in_test"}


def test_a_folder_without_documented_functions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train, validation, test"):
        build_docstring_task(tmp_path)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x. Then stop.", "Return x."),
        ("Return x\n   of os.path.\n\nMore.", "Return x of os.path."),
        ("Close it (e.g. this one) now. `Bye`", "Close it (e.g. this one) now."),
        ("No period\n\nMore.", "No period"),
        ("", ""),
    ],
)
def test_the_first_sentence_ends_at_its_period_or_paragraph(docstring, sentence):
    assert first_sentence(docstring) == sentence


@pytest.fixture(scope="module")
def standard_library():
    return build_docstring_task()


def test_the_standard_library_gives_thousands_of_rows_and_varied_held_out_modules(standard_library):
    modules = {s: [name.partition(".")[0] for name in standard_library[s]["name"]] for s in SPLITS}
    assert len(modules["train"]) > 3000
    for split in ("validation", "test"):
        assert len(modules[split]) > 200
        assert max(modules[split].count(module) for module in set(modules[split])) < 0.25 * len(modules[split])


def test_no_top_level_module_and_no_source_is_in_two_splits(standard_library):
    for key in (lambda row: row["name"].partition(".")[0], lambda row: row["source"]):
        seen = [set(map(key, standard_library[split])) for split in SPLITS]
        assert sum(map(len, seen)) == len(set.union(*seen))


def test_no_source_of_the_standard_library_contains_its_docstring(standard_library):
    for row in standard_library["test"]:
        assert row["target"] not in row["source"]
        function = ast.parse(row["source"]).body[0]
        assert ast.get_docstring(function) is None
