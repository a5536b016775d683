"""Write a sweep of N finished runs, from the records of a committed one, to time commands that train nothing.

    python benchmarks/finished_sweep.py 1000 big
    python -m lorabench -m +experiment=planted_rank sweep.name=big sweep.dir=big optimizer.lr=... sweep.tune_seeds=...

The second command is printed. Runs are those that it lists; each gets the metrics, the history and the resources of a
committed run, and the fingerprints of the data, the base and the source code that are here.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from lorabench.launch.listing import list_jobs
from lorabench.runtime.provenance import code_fingerprint
from lorabench.store.records import Store
from lorabench.sweep.execute import check_all
from lorabench.sweep.packs import Job, assign_packs, write_cells
from lorabench.tasks.probe import probe_fingerprint
from lorabench.training import precision, preparation

SOURCE = Path(__file__).parents[1] / "sweeps" / "ref_planted_rank"
EXPERIMENT, RATES, SEEDS_FROM = "planted_rank", 5, 1000


def overrides(runs: int, out: Path) -> list[str]:
    """Return the words that list at least `runs` runs: the experiment's cells at five rates, with as many seeds."""
    rates = ",".join(f"{1e-3 * 2**i:g}" for i in range(RATES))
    place = [f"sweep.name={out.name}", f"sweep.dir={out}", f"report.dir={out}-report", f"optimizer.lr={rates}"]
    cells = len(list_jobs(EXPERIMENT, [*place, "sweep.tune_seeds=[0]"]).jobs) / RATES
    seeds = range(SEEDS_FROM, SEEDS_FROM + max(1, round(runs / cells / RATES)))
    return [
        *place,
        f"sweep.tune_seeds=[{','.join(map(str, seeds))}]",
        "sweep.confirm_seeds=[]",
        "sweep.extend_lr=false",
    ]


def write(jobs: list[Job], out: Path) -> None:
    """Write the manifest of the jobs, and a finished record and a history of each run."""
    source, store = Store(SOURCE), Store(out)
    samples = [r for r in source.records() if r.status == "completed" and r.role == "tune"]
    histories = {r.run_id: source.history(r.run_id) for r in samples}
    write_cells(store, jobs, check_all(jobs), only_new=False)
    with store.locked():
        precision.note_device(store, jobs[0].run)
        assign_packs(store, jobs)
    for number, job in enumerate(jobs):
        run, sample = job.run, samples[number % len(samples)]
        here = {
            "data_fingerprint": preparation.load_data(run.task).fingerprint,
            "model_fingerprint": preparation.model_fingerprint(run),
            "probe_fingerprint": probe_fingerprint(run),
            "user_code": preparation.user_code_fingerprint(run),
            "code": code_fingerprint(),
        }
        provenance = {**sample.provenance, **here}
        store.append_history(run.run_id, histories[sample.run_id])
        config = run.to_dict()
        store.write(replace(sample, run_id=run.run_id, role=run.role, config=config, provenance=provenance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    words = overrides(options.runs, options.out)
    jobs = list({job.run.run_id: job for job in list_jobs(EXPERIMENT, words).jobs}.values())
    write(jobs, options.out)
    print(shlex.join(["python", "-m", "lorabench", "-m", f"+experiment={EXPERIMENT}", *words]))


if __name__ == "__main__":
    main()
