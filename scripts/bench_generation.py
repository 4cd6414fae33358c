"Tasks per second of the generator: per family and number of nodes, and how the cost grows with rows and edges."
import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.scm import SCMFamily

# tasks/s at d = 20, 50, 100 of a published generator of the same families on a machine of the same kind (n 1000, ER with 2d edges, one thread)
PUBLISHED = {"linear": (163, 68, 34), "neural_net": (97, 41, 20), "gpcde": (9.8, 4.6, 2.3), "square": (520, 240, 120), "periodic": (520, 240, 120),
             "logistic_map": (520, 240, 120), "mixture": (28, 10, 5)}
TARGET = {"linear": 10}  # times the published rate; 5 for the others
SIZES = (20, 50, 100)
MIXTURE = {"linear": .34, "neural_net": .33, "gpcde": .33}
FAMILIES = {
    "linear": {"mechanism": {"type": "linear"}}, "linear per_row": {"mechanism": {"type": "linear", "noise_scale": "per_row"}},
    "neural_net": {"mechanism": {"type": "neural_net"}}, "gpcde": {"mechanism": {"type": "gpcde"}}, "square": {"mechanism": {"type": "square"}},
    "periodic": {"mechanism": {"type": "periodic"}}, "logistic_map": {"mechanism": {"type": "logistic_map"}},
    "post_nonlinear": {"mechanism": {"type": "post_nonlinear"}}, "mixture": {"mechanisms": MIXTURE, "per": "node"},
}


def family(name: str, edges_per_node: float = 2.) -> SCMFamily:
    return SCMFamily(graph={"type": "er", "edges_per_node": edges_per_node}, **FAMILIES[name])


def sgemm(size: int = 1024, repeats: int = 5) -> float:
    "Matrix products of this process, in 10^9 operations per second (the best of some)."
    a, best = torch.ones(size, size), 1e9
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2*size**3/best/1e9


def rate(scms: SCMFamily, d: int, n: int, batch: int, seconds: float) -> float:
    "Tasks per second from keys to data: the best of as many batches as fit into the time, at least three."
    best, began, step = 1e9, time.perf_counter(), 0
    while step < 4 or time.perf_counter() - began < seconds:
        begin = time.perf_counter()
        scms.sample(TaskStreams(0, "train", "bench", tuple(range(step*batch, (step + 1)*batch))), d).sample(n)
        if step: best = min(best, time.perf_counter() - begin)
        step += 1
    return batch/best


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench generation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the time, for a first look")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    seconds, threads = (.5 if options.quick else 2.5), sorted({1, os.cpu_count() or 1})
    found = {"machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}, "n": 1000, "rates": [], "growth": [], "sgemm": []}

    def note_sgemm(count: int) -> None:
        found["sgemm"].append({"threads": count, "gflops": round(sgemm(), 1)})
        print(f"sgemm with {count} thread{'s'*(count > 1)}: {found['sgemm'][-1]['gflops']:.1f} Gflop/s", flush=True)

    for count in threads:
        torch.set_num_threads(count)
        note_sgemm(count)
        print(f"\n{'tasks/s, n 1000, 2d edges':28}" + "".join(f"{f'd {d}':>10}{'x publ.':>9}" for d in SIZES) + "   target")
        for name in FAMILIES:
            line, published = f"{name:28}", PUBLISHED.get(name.split()[0])
            for i, d in enumerate(SIZES):
                batch = {"gpcde": 8, "mixture": 32}.get(name, 128)
                value = rate(family(name), d, 1000, batch, seconds)
                ratio = value/published[i] if published else None
                found["rates"].append({"family": name, "d": d, "threads": count, "batch": batch, "tasks_per_second": value, "times_published": ratio})
                line += f"{value:>10.4g}" + (f"{ratio:>9.1f}" if ratio else f"{'-':>9}")
            print(line + (f"   {TARGET.get(name.split()[0], 5)}x" if published else ""), flush=True)
        note_sgemm(count)

    torch.set_num_threads(1)
    print("\nmilliseconds per task, one thread, d 50 (growth with rows at 2 edges per node; with edges at n 1000)")
    for name in ("linear", "neural_net", "gpcde"):
        batch = 4 if name == "gpcde" else 16
        for what, values in (("n", (250, 500, 1000, 2000, 4000)), ("edges per node", (.5, 1, 2, 4, 8))):
            ms = [1000/rate(family(name, v if what != "n" else 2), 50, v if what == "n" else 1000, batch, seconds/2) for v in values]
            found["growth"] += [{"family": name, "what": what, "value": v, "ms": m} for v, m in zip(values, ms)]
            print(f"{name:12}{what:16}" + "".join(f"{v:>6g}: {m:<8.3g}" for v, m in zip(values, ms)), flush=True)
    note_sgemm(1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
