# SPDX-License-Identifier: Apache-2.0
"""Generate greedily in vLLM, for test_vllm.py: jobs are read as JSON from stdin, and the targets are the last line."""

import gc
import json
import os
import sys


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def generate(folder, sources, max_tokens, **options):
    """Token ids of the targets and the number of preemptions, or the message of the error that loading raises."""
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 32, **options}
    try:
        engine = LLM(folder, dtype="float32", disable_log_stats=False, **options)
    except Exception as error:
        return str(error)
    prompts = [{"prompt_token_ids": ids} for ids in sources]
    lengths = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(sources)
    parameters = [SamplingParams(temperature=0, max_tokens=length) for length in lengths]
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    (preemptions,) = [one.value for one in engine.get_metrics() if one.name == "vllm:num_preemptions"]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return [list(output.outputs[0].token_ids) for output in outputs], preemptions


if __name__ == "__main__":
    print(json.dumps([generate(**job) for job in json.load(sys.stdin)]))
