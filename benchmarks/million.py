"""Do a million kernels fit into 2 GiB of memory, and does a killed run lose anything?

    python benchmarks/million.py --scratch /somewhere/with/two/gigabytes
    python benchmarks/million.py --scratch /tmp --kernels 20000    # a quick look

Plants 11 x 11 kernels of known parameters in noise, writes them into a .npy file, and fits them in
shards by a process of its own. That process is killed with SIGKILL when half of the shards are
there, and started again; then everything must be there once, and no shard from before the kill may
have been written again. Memory is that of the process and all of its descendants together: the
largest of a sum that is taken twice a second, in which shared pages count once (PSS; elsewhere than
on Linux, pages of one process alone, USS). Writes benchmarks/results/million.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from _report import RESULTS, print_table, write_json
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from gaborium import FitResult, Gabor2d, fit_shards, gabor

SIZE, NOISE = 11, 0.1  # px, share of each kernel's standard deviation
OPTIONS = {"n_starts": 1}  # enough for kernels that are nearly Gabor functions
CHUNK = 10_000  # kernels of one seed, which is the chunk's number
RANGES = {  # of uniform distributions, as in tests/test_fitting.py
    "orientation": (0.0, math.pi),
    "wavelength": (3.0, 8.0),
    "phase": (-math.pi, math.pi),
    "sigma": (1.2, 2.5),
    "aspect_ratio": (0.6, 1.5),
    "amplitude": (0.5, 2.0),
}
LIMIT = 2 * 1024  # MiB


def planted(n: int, seed: int) -> Tensor:
    """Noisy kernels, ``(n, 11, 11)``."""
    generator = torch.Generator().manual_seed(seed)
    fields = {
        name: low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        for name, (low, high) in RANGES.items()
    }
    kernels = gabor(Gabor2d.of(**fields), SIZE)
    noise = torch.randn(kernels.shape, generator=generator, dtype=torch.float64)
    return kernels + NOISE * kernels.std((1, 2), keepdim=True) * noise


def write_kernels(path: Path, n: int) -> None:
    """Chunk by chunk, so that they are never in memory together."""
    shape = (n, SIZE, SIZE)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for seed, start in enumerate(range(0, n, CHUNK)):
        file[start : start + CHUNK] = planted(min(CHUNK, n - start), seed)
    file.flush()


def fit_with_progress(path: Path, folder: Path, shard_size: int, n_jobs: int) -> None:
    """What the measured process does."""
    columns = [*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        bar = progress.add_task("Fitting")
        fit_shards(
            path,
            folder,
            shard_size=shard_size,
            n_jobs=n_jobs,
            options=OPTIONS,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )


class Watch:
    """Peak memory and time of some processes and all of their descendants, ended ones too."""

    def __init__(self) -> None:
        self.peak_mib, self.cpu_seconds = 0.0, dict[psutil.Process, float]()

    def look(self, root: psutil.Process) -> None:
        family, memory = {*self.cpu_seconds, root}, 0
        with suppress(psutil.NoSuchProcess):
            family |= set(root.children(recursive=True))
        for process in family:
            try:
                pages, times = process.memory_full_info(), process.cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            memory += getattr(pages, "pss", pages.uss)
            self.cpu_seconds[process] = times.user + times.system
        self.peak_mib = max(self.peak_mib, memory / 2**20)


def follow(command: list[str], watch: Watch, folder: Path, kill_at: int | None) -> int:
    """Start the process, and wait for its end or kill it; returns its exit code."""
    with psutil.Popen(command) as process:
        while process.poll() is None:
            watch.look(process)
            if kill_at is not None and len(shards_in(folder)) >= kill_at:
                process.kill()
            time.sleep(0.5)
        return int(process.wait())


def shards_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Finished shards, with what changes when one is written again."""
    files = {path.name: path.stat() for path in folder.glob("shard-*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def measure(scratch: Path, n: int, shard_size: int, n_jobs: int) -> dict[str, object]:
    """Plant, fit, kill, go on, and count what is there."""
    path, folder, watch = scratch / "kernels.npy", scratch / "shards", Watch()
    write_kernels(path, n)
    n_shards = math.ceil(n / shard_size)
    command = [sys.executable, __file__, "--fit", str(path), str(folder)]
    command += ["--shard-size", str(shard_size), "--jobs", str(n_jobs)]

    killed = follow(command, watch, folder, kill_at=max(1, n_shards // 2))
    before = shards_in(folder)
    if killed == 0 or len(before) == n_shards:
        raise SystemExit("The run was over before the kill; take more --kernels.")
    if follow(command, watch, folder, kill_at=None) != 0:
        raise SystemExit("The second run failed.")

    after = shards_in(folder)
    shards = sorted(folder.glob("shard-*"))
    outcomes = Counter(end.name for path in shards for end in FitResult.load(path).outcome)
    return {
        "kernels": n,
        "kernel_size": [SIZE, SIZE],
        "noise_share": NOISE,
        "ranges": RANGES,
        "options": OPTIONS,
        "seeds": f"0 to {math.ceil(n / CHUNK) - 1}, one for every {CHUNK} kernels",
        "shard_size": shard_size,
        "jobs": n_jobs,
        "shards": len(shards),
        "kills": 1,
        "shards_before_kill": len(before),
        "shards_before_kill_written_again": sum(after[name] != before[name] for name in before),
        "results": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "share_converged": outcomes["CONVERGED"] / n,
        "peak_memory_mib": round(watch.peak_mib),
        "cpu_seconds": round(sum(watch.cpu_seconds.values())),
        "kernels_file_mib": round(path.stat().st_size / 2**20),
        "shards_mib": round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scratch", type=Path, help="folder for what is made and removed again")
    parser.add_argument("--kernels", type=int, default=1_000_000)
    parser.add_argument("--shard-size", type=int, default=4096)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "million.json")
    parser.add_argument("--fit", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fit:
        fit_with_progress(*options.fit, options.shard_size, options.jobs)
        return
    if options.scratch is None:
        parser.error("--scratch is needed: a folder on a disk with room for two gigabytes.")
    with TemporaryDirectory(dir=options.scratch) as scratch:
        found = measure(Path(scratch), options.kernels, options.shard_size, options.jobs)
    shown = ("kernels", "results", "shards", "shards_before_kill")
    shown += ("shards_before_kill_written_again", "share_converged", "peak_memory_mib")
    print_table(
        "A fit in shards, killed once",
        ["", "found"],
        [[name, str(found[name])] for name in (*shown, "cpu_seconds")],
    )
    write_json(options.output, found)
    whole = found["results"] == found["kernels"]
    if not whole or found["shards_before_kill_written_again"] or found["peak_memory_mib"] >= LIMIT:
        raise SystemExit("Not what it should be: see the table.")


if __name__ == "__main__":
    main()
