# SPDX-License-Identifier: Apache-2.0
"""Write rows of what people ask every day: requests, and the shell commands for them.

    python examples/everyday_rows.py everyday.jsonl [--held-out FILE ...] [--topics TOPIC ...] [--copies N]

Requests that are near those of the held-out files, which have `source` and `target`, are left out.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from encdec_slm_cli.console import set_up_logging


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--held-out", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--topics", nargs="*", default=[], metavar="TOPIC", help="default: all")
    parser.add_argument("--copies", type=int, default=3, help="rows of each request; default: 3")
    args = parser.parse_args(arguments)
    set_up_logging(debug=False)
    from encdec_slm.checkpoints import write_file
    from encdec_slm.trainers.tasks.shell import decontaminate, everyday_rows, row_order
    from encdec_slm.trainers.tasks.shell_sources import read_nl2bash

    held_out = [row.source for path in args.held_out for row in read_nl2bash(path)]
    rows = everyday_rows(args.copies, topics=args.topics)
    rows = sorted(decontaminate(rows, held_out), key=row_order)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.output, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    print(f"{len(rows):,} rows")


if __name__ == "__main__":
    main()
