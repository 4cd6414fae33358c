"What an optimiser step costs: seconds and peak memory of AVICI and BCNP by size, what each optimisation brings, and ranks and workers."
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_generation import sgemm

import causal_meta.models.avici  # noqa: F401  registers the model
import causal_meta.models.bcnp  # noqa: F401
from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.streams import MetaIterableDataset, TaskBatch
from causal_meta.models import permutations
from causal_meta.models.base import build_model
from causal_meta.runners.steps import compile_blocks, gradients, micro_batches

SHAPE = {"B": 8, "n": 200, "d": 20}
# a published PyTorch implementation at batch 8, n 200, d 20: processor seconds per step, and gigabytes where they are known
PUBLISHED = {("avici", "200k"): (3.75, None), ("bcnp", "200k"): (2.05, None), ("avici", "paper"): (27., 12.), ("bcnp", "paper"): (49., 9.6)}
# the published measurement of the smaller ones: 210k and 202k parameters, BCNP with 10 permutations
EQUAL = {"avici": {"size": "small", "layers": 2, "dropout": .1}, "bcnp": {"size": "small", "encoder_layers": 2, "decoder_layers": 2, "permutations": 10}}


def batch_of(B: int, n: int, d: int) -> TaskBatch:
    "Noise in the place of data: the cost of a step does not depend on it."
    generator = torch.Generator().manual_seed(0)
    graphs = (torch.rand((B, d, d), generator=generator) < .2).triu(1)
    return TaskBatch(torch.randn((B, n, d), generator=generator), graphs, torch.zeros(B, n, d, dtype=torch.bool), torch.ones(B, d, dtype=torch.bool),
                     [("bench", "train", b) for b in range(B)])


def without(optimisation: str, model: str) -> None:
    "Take one optimisation away, by its plain counterpart."
    if optimisation == "fused attention":
        def plain(q, k, v, attn_mask=None):
            scores = q @ k.transpose(-1, -2)/q.shape[-1]**.5
            return (scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)).softmax(-1) @ v
        torch.nn.functional.scaled_dot_product_attention = plain
    if optimisation == "early stop and implicit gradient of Sinkhorn":
        def unrolled(scores, tolerance=0., iterations=1000):
            log_q = scores
            for _ in range(iterations): log_q = (log_q - log_q.logsumexp(-2, keepdim=True)); log_q = log_q - log_q.logsumexp(-1, keepdim=True)
            return log_q.exp()
        permutations.sinkhorn = unrolled


def one(model: str, settings: dict, shape: dict, change: str, repeats: int) -> dict:
    "Measure a step in this process; it is started for this one measurement, so that peak memory is its own."
    torch.set_num_threads(1)
    how = {"micro": None, "kind": "fp32"}
    if change.startswith("without "): without(change.removeprefix("without "), model)
    if change.startswith("micro-batches of "): how["micro"] = int(change.split()[-1])
    if change == "bf16": how["kind"] = "bf16"
    net, batch = build_model(model, settings).train(), batch_of(**shape)
    if change == "compiled blocks": compile_blocks(net)
    optimizer = torch.optim.AdamW(net.parameters())
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

    def step() -> None:
        gradients(net, micro_batches([batch], how["micro"]), kind=how["kind"])
        optimizer.step()
    if repeats > 1: step()  # warm up
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    return {"parameters": sum(p.numel() for p in net.parameters()), "cpu_seconds": min(times), "gflops": sgemm(),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024 - idle}


def scaling(ranks: int, workers: int, steps: int = 30) -> float:
    "Tasks per second of a whole pre-training of a small AVICI on d 8, in as many processes, after the first steps."
    script = f"""
import tempfile, os, time
from causal_meta.runners import pre_training as p
from causal_meta.runners.config import load_config
from causal_meta.runners.distributed import rank_of
from causal_meta.runners.runs import create_run, RunDir
from pathlib import Path
config = load_config({{"name": "scaling", "benchmark": "audit-small-v1", "models": {{"avici": {{"type": "avici", "config": {{"size": "small"}}}}}},
    "pre_training": {{"steps": {steps}, "global_batch": 16, "validate_every": 10000, "checkpoint_every": 10000, "log_every": 1000, "workers": {workers}, "threads": 1}}}})
own, seen = p.train_step, []
def timed(t, *given, **named):
    line = own(t, *given, **named)
    seen.append(time.perf_counter())
    return line
p.train_step, p.validate = timed, lambda *given: 0.
folder = Path(os.environ["BENCH_FOLDER"])
run = create_run(config, folder) if rank_of().rank == 0 else RunDir(folder/"scaling")
while not (run.path/"config.yaml").exists(): time.sleep(.1)
p.pre_train(run, "avici")
if rank_of().rank == 0: print("RATE", 16*(len(seen) - 6)/(seen[-1] - seen[5]))
"""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"job.py"
        file.write_text(script)
        launch = [sys.executable, str(file)] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(file)]
        done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "BENCH_FOLDER": folder})
    if done.returncode: raise SystemExit(done.stderr)
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("RATE")))


def generator_alone(tasks: int = 512) -> float:
    "Tasks per second of the stream that `scaling` trains on."
    torch.set_num_threads(1)
    stream = MetaIterableDataset(load_benchmark("audit-small-v1"), global_batch=16)
    stream.at(0)
    begin = time.perf_counter()
    for step in range(tasks//16): stream.at(step)
    return tasks/(time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes only, for a first look")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(json.dumps(one(**json.loads(options.one))))
    found = {"machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}, "steps": [], "scaling": []}

    def measure(model: str, name: str, settings: dict, shape: dict, change: str = "", repeats: int = 3) -> None:
        given = {"model": model, "settings": settings, "shape": shape, "change": change, "repeats": repeats}
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps(given)], capture_output=True, text=True)
        row = {"model": model, "size": name, **shape, "change": change}
        if done.returncode: row |= {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"signal {-done.returncode}"}
        else: row |= json.loads(done.stdout.splitlines()[-1])
        published = PUBLISHED.get((model, name)) if shape == SHAPE and change in ("", "micro-batches of 1") else None
        if published and "cpu_seconds" in row: row |= {"published_cpu_seconds": published[0], "published_bytes": published[1] and published[1]*1e9}
        found["steps"].append(row)
        text = row.get("failed") or f"{row['parameters']:>10,} {row['cpu_seconds']:>9.3f} s {1/row['cpu_seconds']:>8.2f}/s {row['peak_bytes']/1e9:>7.2f} GB {row['gflops']:>6.0f} Gflop/s"
        if published and "failed" not in row: text += f"   published {published[0]} s" + (f", {published[1]} GB" if published[1] else "")
        print(f"{model:6} {name:6} n {shape['n']:<5} {change:46} {text}", flush=True)

    print("processor seconds of an optimiser step (batch 8, d 20, one thread), steps per processor second, memory above the idle process, sgemm rate")
    for model in ("avici", "bcnp"):
        for change in ("", "micro-batches of 1"): measure(model, "200k", EQUAL[model], SHAPE, change)
        for name in ("small", "base", "paper")[:1 if options.quick else 3]:
            for n in (200, 1000):
                large = name != "small" and n == 1000
                measure(model, name, {"size": name}, SHAPE | {"n": n}, "micro-batches of 1" if large else "", repeats=1 if large else 2)
            if name == "paper": measure(model, name, {"size": name}, SHAPE, "micro-batches of 1", repeats=2)
    for model in ("avici", "bcnp"):
        changes = ["without fused attention", "micro-batches of 2", "compiled blocks", "bf16"]
        if model == "bcnp": changes.insert(1, "without early stop and implicit gradient of Sinkhorn")
        for change in changes: measure(model, "small", {"size": "small"}, SHAPE, change)
    if not options.quick:
        found["generator_tasks_per_second"] = generator_alone()
        print(f"\nthe generator alone: {found['generator_tasks_per_second']:.0f} tasks/s in one process")
        for ranks, workers in ((1, 0), (1, 1), (2, 0), (2, 1)):
            found["scaling"].append({"ranks": ranks, "workers": workers, "tasks_per_second": scaling(ranks, workers)})
            print(f"pre-training AVICI small, d 5-10: ranks {ranks}, workers {workers}: {found['scaling'][-1]['tasks_per_second']:.1f} tasks/s", flush=True)
    if options.out: options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
