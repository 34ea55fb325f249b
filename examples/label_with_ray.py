# SPDX-License-Identifier: Apache-2.0
"""Label a data set with a teacher on all devices of a Ray cluster.

    python examples/label_with_ray.py TEACHER rows.jsonl outputs/labels --distributions topk:32 --workers 2

Each worker loads the teacher once and labels ranges of rows into shards of one teacher cache, as `encdec-slm label`
does on one machine. A range whose worker dies is given to another one. On a cluster, start Ray on each machine, put
the data and the output on a file system that all of them see, and set `RAY_ADDRESS`.
"""

import argparse
import logging
import time

import ray

from encdec_slm.trainers.prompt_templates import read_prompt_template
from encdec_slm.trainers.teacher_cache import DistributionSpec, TeacherCache
from encdec_slm.trainers.teacher_engines import CompletionSettings
from encdec_slm.trainers.teacher_labels import LabelSettings, build_engine, label_dataset, load_label_rows


class LabelRange:
    """A worker: a loaded teacher that labels the ranges of rows that it is given."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.engine = build_engine(arguments.engine, arguments.teacher, batch_tokens=arguments.batch_tokens)
        self.chat = self.engine.tokenizer.chat_template is not None
        self.rows = _load_rows(arguments, self.chat)

    def __call__(self, batch: dict) -> dict:
        """Label a batch of ranges, which have the columns `start` and `stop`."""
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            settings = _settings(self.arguments)
            label_dataset(
                self.rows,
                self.engine,
                self.arguments.output,
                settings,
                teacher=self.arguments.teacher,
                rows=(start, stop),
                # As `encdec-slm label` describes it, so that both continue each other's labels.
                prompt_template=f"{self.chat} {read_prompt_template(self.arguments.prompt_template)}",
            )
        return batch


def _load_rows(arguments, chat=False):
    targets = None if arguments.completions else arguments.target_column
    options = {"prompt_template": arguments.prompt_template, "chat": chat}
    return load_label_rows(arguments.data, arguments.source_column, targets, **options)


def _settings(arguments):
    spec = None if arguments.distributions is None else DistributionSpec.parse(arguments.distributions)
    completions = CompletionSettings(arguments.max_new_tokens) if arguments.completions else None
    return LabelSettings(spec, completions, rows_per_shard=arguments.rows_per_shard)


def label_with_ray(arguments: argparse.Namespace) -> TeacherCache:
    """Label all rows and return the cache."""
    num_rows, size = len(_load_rows(arguments)), arguments.rows_per_shard
    ranges = [{"start": start, "stop": min(start + size, num_rows)} for start in range(0, num_rows, size)]
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    workers = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(
        LabelRange,
        fn_constructor_args=(arguments,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=arguments.cpus_per_worker,
        num_gpus=arguments.gpus_per_worker,
    )
    started = time.perf_counter()
    workers.materialize()
    cache = TeacherCache(arguments.output)
    print(f"Labeled {cache.num_rows:,} rows in {time.perf_counter() - started:.1f} s by {arguments.workers} workers.")
    return cache


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="folder or Hub name of a decoder-only model")
    parser.add_argument("data", help="JSON, CSV or Parquet file, or a data set on the Hub")
    parser.add_argument("output", help="folder of the teacher cache")
    parser.add_argument("--distributions", help="topk:K or sampled:N")
    parser.add_argument("--completions", action="store_true", help="let the teacher generate the targets")
    parser.add_argument("--engine", default="transformers", choices=("transformers", "ctranslate2", "vllm"))
    parser.add_argument("--source_column", default="source")
    parser.add_argument("--target_column", default="target")
    parser.add_argument("--prompt_template", help="Jinja template of the teacher's prompt")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--rows_per_shard", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1, help="teachers that are loaded at once")
    parser.add_argument("--cpus_per_worker", type=float, default=1)
    parser.add_argument("--gpus_per_worker", type=float, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    label_with_ray(parse_arguments())
