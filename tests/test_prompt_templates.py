# SPDX-License-Identifier: Apache-2.0
import pytest

from encdec_slm.trainers.prompt_templates import load_prompt_template


TEMPLATE = "Example: 1 -> one\n{% if context %}Context: {{ context }}\n{% endif %}Request: {{ source }}"


def test_the_fields_of_a_row_are_filled_in():
    render = load_prompt_template(TEMPLATE)
    assert render({"source": "2 {{ x }}", "context": ""}) == "Example: 1 -> one\nRequest: 2 {{ x }}"


def test_a_template_is_read_from_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfRequest: {{ source }}\n")
    assert load_prompt_template(tmp_path / "prompt.txt")({"source": "a"}) == "Request: a"


@pytest.mark.parametrize(
    ("template", "row", "named"),
    [
        ("{{ sorce }}", {"source": "a"}, "sorce"),
        ("{{ source.name }}", {"source": "a"}, "name"),
        ("{% if %}", {}, "Jinja"),
        ("no such file.txt", {}, "no such file"),
        ("{{ source.__class__.__mro__ }}", {"source": "a"}, "__class__|unsafe"),
    ],
)
def test_what_is_wrong_is_named(template, row, named):
    with pytest.raises(ValueError, match=named):
        load_prompt_template(template)(row)
