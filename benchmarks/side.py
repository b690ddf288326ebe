"""One side of a row in a process of its own: python -m benchmarks.side ROW ours|theirs JSON-ARGUMENTS

It answers each line of its input with a line of JSON: `count` with the operations of a call, the path of a file with
the times of a call whose output it writes there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ldm import cli
from ldm.machine.allocator import share_freed_memory
from ldm.machine.cores import share_cores


def main(name: str, who: str, size: str, device: str, folder: str) -> None:
    if who == "ours":  # as the sampling scripts begin
        cli.only_samples = True
        share_freed_memory()
        share_cores()
    from benchmarks.measure import operations
    from benchmarks.models import Models
    from benchmarks.rows import ROWS

    work = ROWS[name](Models(size, torch.device(device), Path(folder)))
    side = getattr(work, who)
    for line in sys.stdin:
        if line.strip() == "count":
            print(json.dumps({"flop": operations(side)}), flush=True)
            continue
        sample = side()
        torch.save(sample.output, line.strip())
        print(json.dumps({"seconds": sample.seconds, "cpu_seconds": sample.cpu_seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], **json.loads(sys.argv[3]))
