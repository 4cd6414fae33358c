"DiBS: gradients against brute force, budgets, seeds, interventions, the exact posterior, and the published library."
from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.graphs import is_dag
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.datasets.validation import InputError
from causal_meta.models.base import Budget, build_model
from causal_meta.models.dibs import DiBSConfig, graph_scorer, graphs_gradient, parent_sets_of, resolved, sets_gradient
from causal_meta.models.dibs_joint import Mechanisms, gaussian_rows, initial_parameters, node_log_likelihood
from causal_meta.models.exact import exact_posterior
from causal_meta.models.latent_graphs import hard_graphs, off_diagonal, svgd_direction
from causal_meta.models.scores import bge_local_scores
from causal_meta.models.set_scores import score_cache, set_scores

FAST = {"n_steps": 30, "n_particles": 6, "n_gradient_samples": 16, "n_candidates": 64}
MODES = [{}, {"variant": "paper"}, {"estimator": "sets"}, {"mode": "joint"}, {"mode": "joint", "mechanism": "mlp", "noise": .5}]


def seeded(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


def some_data(n: int = 40, d: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(seed)
    x = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g)
    return x, torch.rand(n, d, generator=g) < .2


def posterior(config: dict, x, mask=None, seed=0, n_samples=20, **budget):
    return build_model("dibs", FAST | config).posterior(x, mask, n_samples=n_samples, generator=seeded(seed), budget=Budget(**budget) if budget else None)


def all_graphs(d: int) -> torch.Tensor:
    i, j = off_diagonal(d).nonzero(as_tuple=True)
    out = torch.zeros(2 ** len(i), d, d, dtype=torch.bool)
    out[:, i, j] = ((torch.arange(len(out))[:, None] >> torch.arange(len(i))) & 1).bool()
    return out


def brute_log_evidence(logits: torch.Tensor, x, mask) -> torch.Tensor:
    "log E p(D | G) of one particle, a loop over all 64 graphs of three nodes and over their nodes."
    table, terms = bge_local_scores(x[None], mask[None])[0], []
    for G in all_graphs(3):
        log_prob = sum(torch.nn.functional.logsigmoid(logits[i, j] if G[i, j] else -logits[i, j]) for i in range(3) for j in range(3) if i != j)
        terms.append(log_prob + sum(table[j, sum(2 ** i for i in range(3) if G[i, j])] for j in range(3)))
    return torch.stack(terms).logsumexp(0)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_marginal_likelihood(seed):
    x, mask = some_data(15, 3, seed)
    mask[0] = False
    logits = (torch.randn(3, 3, generator=seeded(seed), dtype=torch.float64) * off_diagonal(3)).requires_grad_()
    (auto,) = torch.autograd.grad(brute_log_evidence(logits, x, mask), logits)
    step = torch.zeros(3, 3, dtype=torch.float64)
    step[2, 0] = 1e-5
    finite = (brute_log_evidence(logits + step, x, mask) - brute_log_evidence(logits - step, x, mask)) / 2e-5
    assert abs(finite - auto[2, 0]) < 1e-6
    at, every, scorer = logits.detach()[None], all_graphs(3), graph_scorer(x, mask)
    log_probs = torch.nn.functional.logsigmoid(torch.where(every, at, -at))[:, off_diagonal(3).bool()].sum(-1)
    assert (graphs_gradient(every[None], (scorer(every) + log_probs)[None], at)[0] - auto).abs().max() < 1e-5
    assert (sets_gradient(parent_sets_of(score_cache(set_scores(x, mask), 2)), at.float())[0] - auto).abs().max() < 1e-4
    repeats = []
    for k in range(20):
        drawn = hard_graphs(at.float(), 5000, seeded(100 + k))
        repeats.append(graphs_gradient(drawn, scorer(drawn), at.float())[0])
    mean, error = torch.stack(repeats).mean(0), torch.stack(repeats).std(0) / 20 ** .5
    assert ((mean - auto).abs() < 5 * error + 2e-3).all()


def test_svgd_direction():
    g = seeded()
    x, slope, h = torch.randn(5, 6, generator=g, dtype=torch.float64), torch.randn(5, 6, generator=g, dtype=torch.float64), 3.
    moving = x.clone().requires_grad_()
    kernel = (-(moving[:, None] - x[None]).pow(2).sum(-1) / h).exp()   # k(x_b, x_a), differentiated in the first argument only
    for a in range(5):
        (apart,) = torch.autograd.grad(kernel[:, a].sum(), moving, retain_graph=True)
        assert (svgd_direction(x, slope, h)[a] - ((kernel[:, a].detach() @ slope) + apart.sum(0)) / 5).abs().max() < 1e-12


@pytest.mark.parametrize("config", MODES, ids=str)
def test_a_posterior_is_valid_and_its_seed_decides(config):
    x, mask = some_data()
    before = torch.get_rng_state()
    one, same, other = posterior(config, x, mask), posterior(config, x, mask), posterior(config, x, mask, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.graphs, same.graphs) and torch.equal(one.edge_probs, same.edge_probs)
    assert not torch.equal(one.edge_probs, other.edge_probs)
    for name, value in (one.parameters or {}).items(): assert torch.equal(value, same.parameters[name])
    assert torch.isfinite(one.edge_probs).all() and one.edge_probs.min() >= 0 and one.edge_probs.max() <= 1
    assert (one.info["steps"], one.info["stopped_by"], one.info["model"]) == (30, None, "dibs")
    json.dumps(one.info)
    if one.info["reading"] == "draws": assert len(one.graphs) == 20 and is_dag(one.graphs).all() and one.valid_dag_rate == pytest.approx(1)
    elif one.info["reading"] == "limit": assert len(one.graphs) == 6 and one.valid_dag_rate == pytest.approx(1 - one.info["cyclic_particles"])


@pytest.mark.parametrize("config", MODES, ids=str)
def test_budgets(config):
    x, mask = some_data()
    steps = posterior(config, x, mask, steps=3)
    assert (steps.info["steps"], steps.info["stopped_by"]) == (3, "steps")
    cut = posterior(config, x, mask, samples=4)
    assert (len(cut.graphs), cut.info["stopped_by"]) == (4, "samples")
    for limit in (1e-6, .3):
        began = time.monotonic()
        timed = posterior(config | {"n_steps": 10 ** 6}, x, mask, seconds=limit)
        assert timed.info["stopped_by"] == "seconds" and time.monotonic() - began < limit + .5
        assert torch.isfinite(timed.edge_probs).all() and len(timed.graphs) > 0


def test_a_budget_of_seconds_at_twenty_nodes():
    x, _ = some_data(100, 20)
    began = time.monotonic()
    timed = posterior({"n_particles": 20, "n_steps": 10 ** 6}, x, seconds=1.)
    assert timed.info["stopped_by"] == "seconds" and time.monotonic() - began < 2. and len(timed.graphs) > 0
    at_once = posterior({}, x, seconds=1e-6)
    assert (at_once.info["steps"], at_once.info["reading"]) == (0, "limit, cycles cut") and at_once.valid_dag_rate == pytest.approx(1)


def test_what_was_set_says_nothing_of_its_own_mechanism():
    x, mask = some_data(60, 3)
    moved = torch.where(mask, x + 5 * torch.randn(60, 3, generator=seeded(7)), x)
    leaf = torch.zeros(1, 3, 3, dtype=torch.bool)
    rows = [gaussian_rows(y, mask) for y in (x, moved)]
    for kind in ("linear", "mlp"):
        mechanisms = Mechanisms(kind, 3)
        theta = initial_parameters(mechanisms, 1, seeded())
        alone = [node_log_likelihood(leaf[None].float(), theta, mechanisms, r) for r in rows]
        assert torch.allclose(*alone, rtol=1e-4)
        full = [node_log_likelihood(off_diagonal(3)[None, None], theta, mechanisms, r) for r in rows]
        assert not torch.allclose(*full, rtol=1e-2)   # but it is a cause of the others
    edge = leaf.clone()
    edge[0, 0, 1] = True
    gain = [graph_scorer(y, m)(edge) - graph_scorer(y, m)(leaf) for y, m in ((x, mask), (moved, mask), (moved, torch.zeros_like(mask)))]
    direct = [(t := bge_local_scores(y[None], m[None])[0])[1, 1] - t[1, 0] for y, m in ((x, mask), (moved, mask), (moved, torch.zeros_like(mask)))]
    assert torch.allclose(torch.stack(gain).flatten(), torch.stack(direct).float(), atol=1e-3)
    assert abs(gain[1] - gain[2]) > 1e-2


def test_an_intervention_orients_an_edge():
    g = seeded(3)
    x = torch.randn(300, 2, generator=g)
    mask = torch.zeros(300, 2, dtype=torch.bool)
    mask[150:, 0] = True
    x[150:, 0] *= 3
    x[:, 1] = .8 * x[:, 0] + .6 * x[:, 1]
    for config in ({}, {"mode": "joint", "weighting": "dibs+"}):
        seen = build_model("dibs", {"n_steps": 500} | config).posterior(x, mask, n_samples=100, generator=seeded())
        truth = exact_posterior(x[None], mask[None]).edge_probs[0]
        assert truth[0, 1] > .99 and seen.edge_probs[0, 1] > .9, config


def test_bad_input():
    x, mask = some_data()
    with pytest.raises(InputError, match="missing or infinite"): posterior({}, x.masked_fill(mask, torch.nan))
    with pytest.raises(InputError, match="must be"): posterior({}, x, mask[:5])
    with pytest.raises(InputError, match="edges per node"): posterior({"graph_prior": "erdos_renyi", "edges_per_node": 2.}, x)
    with pytest.raises(InputError, match="acyclic"): build_model("dibs", {"acyclic": True})
    with pytest.raises(InputError, match="n_particles"): build_model("dibs", {"n_particels": 5})
    assert resolved(DiBSConfig(variant="paper"), 5)["alpha_slope"] == 1. and resolved(DiBSConfig(), 20)["estimator"] == "sets"


@pytest.mark.parametrize("config", [{}, {"mode": "joint", "n_steps": 100}], ids=str)
def test_a_constant_column_and_few_rows_do_no_harm(config):
    x, _ = some_data(2, 4)
    x[:, 2] = 1.
    assert torch.isfinite(posterior(config, x).edge_probs).all()


def error(found: torch.Tensor, task) -> float:
    "Mean absolute difference of the edge marginals from the exact ones."
    off = off_diagonal(5).bool()
    return (found - exact_posterior(task.data[None]).edge_probs[0])[off].abs().mean().item()


def exact5(positions) -> list:
    tasks = MetaFixedDataset(load_benchmark("exact5-v1"), "a")
    return [tasks[k] for k in positions]


@pytest.mark.slow
def test_close_to_the_exact_posterior():
    tasks = exact5(range(5, 200, 40))
    found = {name: sum(error(build_model("dibs", config).posterior(t.data, n_samples=1000, generator=seeded()).edge_probs, t) for t in tasks) / len(tasks)
             for name, config in (("held", {}), ("paper", {"variant": "paper"}))}
    assert found["held"] < .1 and found["held"] < .8 * found["paper"]


PEER = """
import json, sys, time
import numpy as np, jax, jax.numpy as jnp
from dibs.inference import MarginalDiBS
from dibs.models import BGe, ErdosReniDAGDistribution
out = []
for k, x in enumerate(json.load(sys.stdin)):
    x = jnp.array(x)
    model = MarginalDiBS(x=x, graph_model=ErdosReniDAGDistribution(n_vars=5, n_edges_per_node=1), likelihood_model=BGe(n_vars=5))
    spent = []
    for _ in range(2 if k == 0 else 1):   # the first data set twice: with and without compilation
        start = time.process_time()
        graphs = np.asarray(model.sample(key=jax.random.PRNGKey(0), n_particles=20, steps=2000))
        spent.append(time.process_time() - start)
    out.append({"edge_probs": graphs.mean(0).tolist(), "seconds": spent})
print(json.dumps(out))
"""


def published(tasks) -> list[dict]:
    "dibs-lib's marginal posteriors, in a process with one thread."
    env = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    done = subprocess.run([sys.executable, "-c", PEER], input=json.dumps([t.data.tolist() for t in tasks]), capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.peers
@pytest.mark.slow
def test_no_worse_and_faster_than_the_published_library():
    pytest.importorskip("dibs")
    tasks = exact5((0, 100))  # the notebook has five
    theirs = published(tasks)
    model, ours = build_model("dibs", {"n_steps": 2000}), []
    for t in tasks:
        start = time.process_time()
        edge_probs = model.posterior(t.data, n_samples=1000, generator=seeded()).edge_probs
        ours.append((error(edge_probs, t), time.process_time() - start))
    mine, their = (sum(e) / len(e) for e in ([e for e, _ in ours], [error(torch.tensor(r["edge_probs"]), t) for r, t in zip(theirs, tasks)]))
    assert mine <= their
    assert max(s for _, s in ours) < min(s for r in theirs for s in r["seconds"])
