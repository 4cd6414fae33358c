"What the metrics of one posterior cost: everything but likelihoods, and NIL with I-NIL by either scorer; by number of samples and of nodes."
import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_generation import sgemm

from causal_meta.datasets.graphs import is_dag
from causal_meta.datasets.interventions import InterventionDesign
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.scm import SCMFamily
from causal_meta.datasets.streams import standardise
from causal_meta.datasets.tasks import InterventionalSet
from causal_meta.metrics.adjustment import adjustment_distances
from causal_meta.metrics.gp import gp
from causal_meta.metrics.likelihood import acyclic, graph_log_densities, likelihoods, regressions_of, unseen_rows
from causal_meta.metrics.linear_gaussian import linear_gaussian
from causal_meta.metrics.summary import posterior_metrics, posterior_reliability
from causal_meta.models.base import from_graphs

ROWS, HELD_OUT, SETS, ROWS_OF_SET = 500, 500, 20, 100  # as in audit-v1
PUBLISHED = {"metrics": .607, "likelihoods": 14.}  # seconds for 100 graphs of 20 nodes in published systems (one thread)
SCORERS = {"linear_gaussian": linear_gaussian, "gp": gp}


def task_of(d: int) -> tuple[torch.Tensor, torch.Tensor, list[InterventionalSet], torch.Tensor]:
    "Data, held-out rows, interventional sets and graph of a linear model with two edges for each node."
    scm = SCMFamily(graph={"type": "er", "edges_per_node": 2.}, mechanism={"type": "linear"}).sample(TaskStreams(0, "bench", "linear", (0,), "pcg64"), d)
    data, mean, sd = standardise(scm.sample(ROWS, "noise/train")[0])
    held_out, sets = (scm.sample(HELD_OUT, "noise/held_out")[0] - mean)/sd, []
    for one, rows in InterventionDesign(targets=min(SETS, d), rows=ROWS_OF_SET).sample(scm):
        at = one.targets.reshape(-1, d)[0]
        rows = ((rows[0] - mean)/sd).float()
        sets.append(InterventionalSet(at.nonzero().flatten().tolist(), rows[0, at], rows, at.expand_as(rows).contiguous()))
    return data, held_out.float(), sets, scm.graphs[0]


def graphs_near(truth: torch.Tensor, K: int, scattered: bool, generator: torch.Generator) -> torch.Tensor:
    "K different DAGs: the true one with a few edges changed, or graphs that have nothing in common."
    d, kept = len(truth), []
    while sum(map(len, kept)) < K:
        if scattered:
            order = torch.rand(K, d, generator=generator).argsort(1)
            found = (torch.rand(K, d, d, generator=generator) < 4/max(d - 1, 1)) & (order[:, :, None] < order[:, None, :])
        else: found = truth ^ ((torch.rand(K, d, d, generator=generator) < 3/d**2) & ~torch.eye(d, dtype=torch.bool))
        kept.append(found[is_dag(found)].unique(dim=0))
    return torch.cat(kept)[:K]


def best_of(work: Callable[[], object], repeats: int) -> float:
    "Processor seconds of the fastest repetition: other work on the machine only adds."
    def once() -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun
    return min(once() for _ in range(repeats))


def measure(d: int, K: int, scattered: bool, repeats: int, with_gp: bool) -> dict:
    "One row of the table, in milliseconds."
    generator = torch.Generator().manual_seed(1)
    data, held_out, sets, truth = task_of(d)
    graphs = graphs_near(truth, K, scattered, generator)
    posterior = from_graphs(graphs)
    row = {"d": d, "K": K, "graphs": "scattered" if scattered else "near the truth", "regressions": len(regressions_of(graphs).nodes)}

    def predictive(name: str) -> dict:
        rows = unseen_rows(held_out, sets)
        scorer = SCORERS[name](data, torch.zeros_like(data, dtype=torch.bool), rows)
        distinct, weights = acyclic(posterior.graphs, posterior.weights)
        return likelihoods(graph_log_densities(scorer, distinct, rows.free), weights, rows)

    row["metrics"] = 1000*best_of(lambda: (posterior_metrics(posterior, truth, 100), posterior_reliability(posterior, truth)), repeats)
    row["gadjid"] = 1000*best_of(lambda: adjustment_distances(graphs, truth), repeats)
    row["linear_gaussian"] = 1000*best_of(lambda: predictive("linear_gaussian"), repeats)
    row["gp"] = 1000*best_of(lambda: predictive("gp"), 1) if with_gp else None
    print(f"d {d:3d}  K {K:4d}  {row['graphs']:15s} {row['regressions']:5d} regressions   metrics {row['metrics']:7.1f} ms (gadjid {row['gadjid']:6.1f})   NIL and I-NIL: linear_gaussian {row['linear_gaussian']:7.1f} ms"
          + ("" if row["gp"] is None else f"   gp {row['gp']:8.0f} ms"), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes, no Gaussian processes")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = sgemm()
    print(f"{platform.machine()}, one thread, {rate:.0f} Gflop/s in float32 products; {ROWS} rows of data, {HELD_OUT} held out, up to {SETS} sets of {ROWS_OF_SET}")
    sizes = [(20, 100)] if args.quick else [(20, 100), (20, 10), (20, 300), (20, 1000), (5, 100), (10, 100), (50, 100), (100, 100)]
    rows = [measure(d, K, scattered, 3 if args.quick or d > 20 or K > 100 else 7, not args.quick and (d <= 20 and K <= 100)) for d, K in sizes for scattered in (False, True)]
    print(f"published, 100 graphs of 20 nodes: metrics {1000*PUBLISHED['metrics']:.0f} ms, likelihoods {1000*PUBLISHED['likelihoods']:.0f} ms")
    if args.out: args.out.write_text(json.dumps({"sgemm": rate, "rows": rows, "published": PUBLISHED}, indent=1) + "\n")


if __name__ == "__main__": main()
