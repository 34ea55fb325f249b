# SPDX-License-Identifier: Apache-2.0
"""Convert a T5 student to GGUF with llama.cpp's converter, and compare its answers in llama.cpp with transformers.

    encdec-slm distill --student_architecture t5 --teacher_cache outputs/labels ... --output_dir outputs/t5
    python examples/llama_cpp_t5.py outputs/t5 outputs/t5.gguf --llama-cpp llama.cpp --rows test_random.jsonl

Needs `pip install llama-cpp-python`; its source package has the folder `vendor/llama.cpp` with the converter. The
student must be a T5, because llama.cpp has no model with RoPE and cross-attention. Its tokenizer is a byte-level BPE:
a new one, or that of a Qwen teacher, trimmed or not. llama.cpp runs both, but its converter expects SentencePiece.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.export import CT2EncDecSLM, export_ctranslate2
from encdec_slm.run_results import format_table
from encdec_slm.trainers.evaluation import evaluate_checkpoint


MAX_NEW_TOKENS = 96


def convert(model, output, llama_cpp):
    sys.path.insert(0, str(llama_cpp))
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from conversion.t5 import T5Model

    parts = json.loads(Path(model, "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    name = "gpt-2" if parts["type"] == "ByteLevel" else "qwen2"
    T5Model.set_vocab = TextModel._set_vocab_gpt2
    # The converter knows published vocabularies only.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(output), "--outtype", "f16"]
    convert_hf_to_gguf.main()


class LlamaCppT5:
    """A T5 in llama.cpp, with one thread; `answer` returns the target of a text."""

    def __init__(self, path, ending):
        import llama_cpp

        self.llama_cpp, self.ending = llama_cpp, ending
        self.llama = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
        self.start_id = llama_cpp.llama_model_decoder_start_token(self.llama.model)

    def encode(self, text):
        return self.llama.tokenize(text.encode(), add_bos=False, special=False) + self.ending

    def answer(self, text):
        target, context = [self.start_id], self.llama.ctx
        self.llama_cpp.llama_memory_clear(self.llama_cpp.llama_get_memory(context), True)
        self._run(self.llama_cpp.llama_encode, self.encode(text))
        while len(target) <= MAX_NEW_TOKENS and (len(target) == 1 or target[-1] != self.llama.token_eos()):
            self._run(self.llama_cpp.llama_decode, target[-1:])
            logits = self.llama_cpp.llama_get_logits_ith(context, -1)
            target.append(int(np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).argmax()))
        return target[1:]

    def _run(self, function, ids):
        array = (self.llama_cpp.llama_token * len(ids))(*ids)
        if function(self.llama.ctx, self.llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError(f"llama.cpp could not read {len(ids)} tokens.")


def load_transformers(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return build_answer(tokenizer, model)


def load_ctranslate2(folder, output):
    export_ctranslate2(folder, output, "float32")
    return build_answer(AutoTokenizer.from_pretrained(folder), CT2EncDecSLM.from_pretrained(output, intra_threads=1))


def build_answer(tokenizer, model):
    @torch.inference_mode()
    def answer(text):
        inputs = tokenizer(text, return_tensors="pt")
        # The search of `LlamaCppT5`, whatever the recipe of the training has saved.
        options = {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": MAX_NEW_TOKENS}
        return model.generate(**inputs, **options)[0, 1:].tolist()

    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a T5 with its tokenizer")
    parser.add_argument("output", type=Path, help="GGUF file")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source folder of llama.cpp")
    parser.add_argument("--rows", type=Path, required=True, help="file with `source` and `target`")
    parser.add_argument("--beside", type=Path, help="folder of a model of this family with the tokenizer of the T5")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.output, arguments.llama_cpp)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    engine = LlamaCppT5(arguments.output, tokenizer("")["input_ids"])
    systems = {
        "T5, llama.cpp, float16": engine.answer,
        "T5, transformers, float32": load_transformers(arguments.model),
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.beside is not None:
            systems["family, CTranslate2, float32"] = load_ctranslate2(arguments.beside, Path(folder, "ct2"))
        sources = [json.loads(line)["source"] for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
        texts, seconds = {name: {} for name in systems}, {name: [] for name in systems}
        for source in sources:
            for name, answer in systems.items():
                start = time.process_time()
                ids = answer(source)
                seconds[name].append(time.process_time() - start)
                texts[name][source] = tokenizer.decode(ids, skip_special_tokens=True)
    same = [engine.encode(source) == tokenizer(source)["input_ids"] for source in sources]
    print(f"Equal inputs of llama.cpp and transformers: {100 * statistics.mean(same):.1f} %")
    expected = texts["T5, transformers, float32"]
    rows = [["", "NLC2CMD", "equal to T5 in transformers", "CPU ms per answer"]]
    for name, found in texts.items():
        equal = 100 * statistics.mean(found[source] == expected[source] for source in sources)
        rows.append(
            [name, score(found, arguments.rows), f"{equal:.1f} %", f"{1000 * statistics.median(seconds[name]):.1f}"]
        )
    print(format_table(rows, markdown=True))


def score(texts, rows_file):
    def look_up(requests):
        return [texts[request] for request in requests]

    results = evaluate_checkpoint(look_up, "shell", dataset_name=rows_file, show_progress=False)
    return str(results.saved.metrics["nlc2cmd"])


if __name__ == "__main__":
    main()
