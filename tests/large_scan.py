"""A scan of so many made-up files, and the same with --update: `large_scan.py BUNDLE OUT COUNT`, peaks of memory in MB.

Nothing is read or judged: what is looked at is listing, ledger, summary and result.
"""

import resource
import sys
from pathlib import Path

import pyarrow as pa

from anomaly_vae import Detector, Engine
from anomaly_vae.entries import Entry
from anomaly_vae.scanning import Scan, Wanted
from anomaly_vae.trickling import Trickle


class MadeUp:
    """So many entries in the order of their paths, none of which is there before it is asked for."""

    sorted, plain, reader = True, False, None

    def __init__(self, count: int) -> None:
        self._count, self.identity = count, f"{count} files"

    def __iter__(self):
        for i in range(self._count):
            yield Entry(f"pictures/{i // 1000:06}/{i:09}.png", 100 + i % 7, float(i), lambda _: b"")


def peak() -> int:
    """In MB, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Scan and update."""
    bundle, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    engine = Engine(Detector.load(bundle), "cpu")
    scored = 0

    def score(engine, entries):
        nonlocal scored
        with Trickle(entries) as coming:
            while batch := coming.take(1024):
                rows = []
                for one in batch:
                    p_value = (scored % 100 + 1) / 100
                    rows.append({"path": one.path, "size": one.size, "mtime": one.mtime, "sha256": f"{scored:064x}",
                                 "score": 1 - p_value, "p_value": p_value, "outlier": p_value == 0.01,
                                 "version": engine.detector.version})  # fmt: skip
                    scored += 1
                table = pa.Table.from_pylist(rows, schema=running.schema)
                for part in engine.detector.spec.parts:
                    column = table.schema.get_field_index(f"part_{part}")
                    table = table.set_column(column, f"part_{part}", table["score"])
                yield table

    print("begun", peak(), flush=True)
    for update in (False, True):
        before = scored
        with Scan(engine, MadeUp(count), out, Wanted(update=update)) as running:
            summary = running.run(score=score)
            running.finish(summary)
        print("updated" if update else "scanned", peak(), summary.counts.images, scored - before, flush=True)


if __name__ == "__main__":
    main()
