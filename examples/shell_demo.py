# SPDX-License-Identifier: Apache-2.0
"""Answer six requests with the shell model, and compare its speed with a decoder-only baseline of the same size.

    python examples/shell_demo.py [REQUEST]

REQUEST is answered first. Both models run in CTranslate2 with int8 weights, on one thread. The baseline
has random weights: only its speed is measured.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from encdec_slm_cli.console import set_up_logging
from encdec_slm_cli.destructive import find_dangers
from encdec_slm_cli.shell_model import find_model_folder, load_shell_model


REQUESTS = (
    "find all files larger than 100 MB in /var",
    "count the lines of notes.txt",
    "show the 10 largest files in the current directory",
    "replace foo with bar in all .txt files",
    "delete all empty files below the current directory",
    "compress the logs directory into a tarball",
)
NUM_TOKENS, NUM_RUNS = 20, 15


def main(request=None):
    set_up_logging(debug=False)
    model = load_shell_model()
    for text in REQUESTS if request is None else (request, *REQUESTS):
        started = time.perf_counter()
        answers = model.answer(text)
        milliseconds = 1000 * (time.perf_counter() - started)
        command = answers[0].command if answers else "(no answer)"
        warning = "".join(f"\n  warning: this {danger}" for danger in find_dangers(command))
        print(f"> {text}\n  {command}   [{milliseconds:.0f} ms]{warning}", flush=True)
    print_speed(model)


def print_speed(model):
    """Print the milliseconds of an answer of 20 tokens, medians of runs that take turns."""
    folder = find_model_folder(None)
    prompts = [model.encode(text)[0] for text in REQUESTS]
    lengths = {"min_decoding_length": NUM_TOKENS, "max_decoding_length": NUM_TOKENS}
    with tempfile.TemporaryDirectory() as temporary:
        baseline, num_parameters = build_baseline(folder, Path(temporary))

        def answer_with_model(tokens):
            model.translator.translate_batch([tokens], beam_size=1, **lengths)

        def answer_with_baseline(tokens):
            settings = {"min_length": NUM_TOKENS, "max_length": NUM_TOKENS, "include_prompt_in_result": False}
            baseline.generate_batch([tokens], sampling_topk=1, **settings)

        seconds = [[], []]
        for run in range(NUM_RUNS):
            for function, times in zip((answer_with_model, answer_with_baseline), seconds, strict=True):
                started = time.perf_counter()
                function(prompts[run % len(prompts)])
                times.append(time.perf_counter() - started)
    ours, others = (1000 * statistics.median(times[1:]) for times in seconds)
    print(
        f"\nAn answer of {NUM_TOKENS} tokens takes {ours:.0f} ms; the decoder-only baseline of "
        f"{num_parameters / 1e6:.1f}M parameters takes {others:.0f} ms, {others / ours:.1f} times as long."
    )


def build_baseline(folder, temporary):
    """Convert the decoder-only baseline of a model to CTranslate2; return it and its number of parameters."""
    import ctranslate2
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from encdec_slm.configuration import decoder_only_twin

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoder_only_twin(AutoConfig.from_pretrained(folder)))
    model.save_pretrained(temporary / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(temporary / "model")
    converter = ctranslate2.converters.TransformersConverter(str(temporary / "model"))
    converter.convert(str(temporary / "converted"), quantization="int8")
    return ctranslate2.Generator(str(temporary / "converted"), intra_threads=1), model.num_parameters()


if __name__ == "__main__":
    main(*sys.argv[1:2])
