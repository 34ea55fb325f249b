# SPDX-License-Identifier: Apache-2.0
"""Times a preset against its decoder-only twin, and peers, in every engine that is installed: the proof of its speed.

    python examples/benchmark.py --preset 330m --settings 512:64 2048:128

Random weights, batch 1, greedy search, caches on both sides, every text of the same length. Each contender runs in a
process of its own; those of one engine, and the twin in transformers, take turns, so that a busy moment of the machine
hits all of them. First token: seconds from source ids to the first generated id. Decode rate: the other new tokens by
the seconds that they take. End to end: all of it. Medians and quartiles are reported, beside what memory bandwidth and
matrix products of this machine, measured in between, would allow.

Prints a table per setting and which of the predecessor's claims held, and writes `benchmark.json` (with every raw
time) and `benchmark.png`. Models for the engines are written to `--models` once (about 12 GB for `330m`). Batches,
beams and quality are not measured.
"""

from encdec_slm_cli import run_command

from encdec_slm.trainers.run_reports import run_script


def main():
    run_command("bench")


if __name__ == "__main__":
    run_script(main)
