# SPDX-License-Identifier: Apache-2.0
"""Writes a docstring's first sentence for Python functions; needs transformers only, not this package.

python examples/write_docstring.py checkpoints/docstring-writer textwrap.shorten

MODEL is a folder or the name of a repository on the Hub. FUNCTION is a dotted name of something installed (a function,
or a class or module, for every function in it), a file, `file.py:function` or `file.py:Class.method`, or `-` for
standard input. A docstring that a function has is not shown to the model.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
from pathlib import Path


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def main(model, function):
    functions = functions_named(function)
    from transformers import pipeline  # slow to import: what is wrong with FUNCTION is said before

    writer = pipeline("text2text-generation", model=model, trust_remote_code=True)
    for name, source in functions.items():
        # Of a function longer than the model reads, it reads the beginning.
        written = writer(source, truncation=True)[0]["generated_text"]
        print(f'{name}\n    """{written.strip()}"""\n', flush=True)
    num_millions = writer.model.num_parameters() / 1e6
    print(f"Written by a model of {num_millions:.1f}M parameters: read it before you believe it.")


def functions_named(given):
    """Source without docstrings of every function that is meant, by its name."""
    path, _, wanted = given.rpartition(":") if ".py:" in given else (given, "", "")
    if path == "-":
        text = sys.stdin.read()
    elif path.endswith(".py") and Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    elif path.endswith(".py") and Path(path).parent.is_dir():
        sys.exit(f"write_docstring.py: there is no file {path!r}. Give the path of a Python file, or a dotted name.")
    else:
        return _functions_of_object(path)
    functions = functions_in(text)
    if wanted:
        functions = {name: source for name, source in functions.items() if f".{name}".endswith(f".{wanted}")}
    if not functions:
        kind = f"function {wanted!r}" if wanted else "function"
        sys.exit(f"write_docstring.py: there is no {kind} in {'standard input' if path == '-' else path}.")
    return functions


def _functions_of_object(dotted_name):
    try:
        found = _resolve(dotted_name)
    except (ImportError, AttributeError, ValueError) as error:
        sys.exit(
            f"write_docstring.py: {dotted_name!r} cannot be imported ({error}). Give a dotted name such as "
            "textwrap.shorten, a Python file, or - for standard input."
        )
    found = inspect.unwrap(getattr(found, "fget", found))
    try:
        text = inspect.getsource(found)
    except (OSError, TypeError):
        sys.exit(f"write_docstring.py: {dotted_name} has no Python source: it is compiled, or no function.")
    functions = functions_in(text)
    if not functions:
        sys.exit(f"write_docstring.py: there is no function in {dotted_name}.")
    if inspect.isfunction(found):
        return {dotted_name: next(iter(functions.values()))}
    return {f"{dotted_name}.{name}" if inspect.ismodule(found) else name: source for name, source in functions.items()}


def _resolve(dotted_name):
    """What a dotted name stands for; a module that was not imported yet is."""
    try:
        return pkgutil.resolve_name(dotted_name)
    except AttributeError:
        return importlib.import_module(dotted_name)


def functions_in(text):
    """Source without docstrings of every function in Python code, by its dotted name."""
    text = textwrap.dedent(text)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        sys.exit(f"write_docstring.py: this is no Python code: line {error.lineno}, {error.msg}.")
    lines = text.splitlines()
    return {name: without_docstrings(function, lines) for name, function in _walk(tree, "")}


def _walk(node, prefix):
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{child.name}" if isinstance(child, DEFINITIONS) else ""
        if isinstance(child, FUNCTIONS):
            yield name, child
        yield from _walk(child, f"{name}." if name else prefix)


def without_docstrings(function, lines):
    """A function's lines as the model has learnt to read them: without docstrings, empty lines and indentation."""
    documented = [
        node
        for node in ast.walk(function)
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None
    ]
    removed = {line for node in documented for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    kept = [lines[number - 1] for number in range(first, function.end_lineno + 1) if number not in removed]
    source = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
    try:
        if ast.parse(source).body:
            return source
    except SyntaxError:
        pass
    # The docstring is all that there is, or stands in the line of the `def`.
    for node in documented:
        node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(function)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("function", metavar="FUNCTION")
    main(**vars(parser.parse_args()))
