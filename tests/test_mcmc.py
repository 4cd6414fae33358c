"""Properties of structure MCMC that hold for every data set, and a comparison with another sampler."""
from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import causal_meta.models.mcmc  # noqa: F401  registers the model
from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.graphs import enumerate_dags, generations, is_dag
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.datasets.validation import InputError
from causal_meta.models.base import Budget, build_model
from causal_meta.models.exact import exact_posterior
from causal_meta.models.partitions import choose_candidates, conditional_edge_probs, family_tables, knowledge, layer_log_weights, sample_dags
from causal_meta.models.scores import bge_local_scores, graph_scores
from causal_meta.models.set_scores import set_scores

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2 ** 32)
QUICK = {"steps": 40, "thin": 2, "chains": 4}


def correlated(seed: int, d: int, n: int = 60) -> torch.Tensor:
    "A data set (n, d) of random linear mixtures with random scales and means."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return draw(n, d) @ draw(d, d) * draw(d).exp() + draw(d)


def sampled(x, mask=None, seed=0, n_samples=50, budget=None, config=QUICK, **edges):
    return build_model("mcmc", config).posterior(x, mask, n_samples=n_samples, generator=torch.Generator().manual_seed(seed), budget=budget, **edges)


def off(d: int) -> torch.Tensor: return ~torch.eye(d, dtype=torch.bool)


@few
@given(seed=seeds, m=st.integers(1, 3), intervene=st.booleans(), score=st.sampled_from(["bge", "bic"]), most=st.sampled_from([None, 1, 2]))
def test_partition_weights_and_edges_are_sums_over_dags(seed, m, intervene, score, most):
    "Also with few candidates, interventions, a limit on parents, and edges that are known."
    x, g = correlated(seed, 4), torch.Generator().manual_seed(seed)
    mask = torch.rand(60, 4, generator=g) < .1 if intervene else None
    known, scores, graphs = knowledge(4, forbidden=[[0, 1]], required=[[2, 3]]), set_scores(x, mask, score), enumerate_dags(4)
    ranking = choose_candidates(scores, m, known)
    strangers = graphs.mT.gather(2, ranking[None, :, m:].expand(len(graphs), -1, -1)).sum(2)
    legal = ~graphs[:, 0, 1] & graphs[:, 2, 3] & (strangers <= 1).all(1) & (graphs.sum(1) <= (most or 4)).all(1)
    logs = scores.graphs(graphs).masked_fill(~legal, -torch.inf)
    states, which = torch.unique(generations(graphs), dim=0, return_inverse=True)
    truth = torch.full((len(states), len(graphs)), -torch.inf, dtype=torch.float64).scatter(0, which[None], logs[None]).logsumexp(1)
    t = family_tables(scores, ranking, m, known, most)
    found = layer_log_weights(t, states).sum(1)
    assert (found.softmax(0) - truth.softmax(0)).abs().max() < 1e-9
    real = found.isfinite()
    edges = torch.einsum("s,sij->ij", found[real].softmax(0), conditional_edge_probs(t, states[real]))
    assert (edges - torch.einsum("g,gij->ij", logs.softmax(0), graphs.double())).abs().max() < 1e-8
    likely = states[found > found.max() - 20]
    draws = sample_dags(t, likely, g)
    assert torch.equal(generations(draws), likely) and draws[:, 2, 3].all() and not draws[:, 0, 1].any() and (draws.sum(1) <= (most or 4)).all()


@few
@given(seed=seeds, d=st.integers(2, 9), intervene=st.booleans(), candidates=st.sampled_from([2, 14]))
def test_samples_are_acyclic_and_reproducible(seed, d, intervene, candidates):
    x = correlated(seed, d)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < .2 if intervene else None
    first, again = (sampled(x, mask, seed % 1000, config={**QUICK, "candidates": candidates}) for _ in range(2))
    assert is_dag(first.graphs).all() and first.graphs.shape == (50, d, d)
    assert torch.equal(first.graphs, again.graphs) and torch.equal(first.edge_probs, again.edge_probs) and first.info == again.info
    assert (first.edge_probs + first.edge_probs.T).max() <= 1 + 1e-9
    json.dumps(first.info, allow_nan=False)


@few
@given(seed=seeds, candidates=st.sampled_from([2, 14]), most=st.sampled_from([None, 2]))
def test_knowledge_is_honoured(seed, candidates, most):
    "A random order, some of its edges required, some pairs forbidden."
    g, x = torch.Generator().manual_seed(seed), correlated(seed, 6)
    order = torch.randperm(6, generator=g).tolist()
    required = [[order[0], order[3]], [order[3], order[4]]]
    forbidden = [[order[2], order[1]], [order[1], order[2]], [order[4], order[5]]]
    p = sampled(x, seed=1, config={**QUICK, "candidates": candidates, "max_parents": most, "required": required[:1]}, required=required[1:], forbidden=forbidden)
    for i, j in required: assert p.graphs[:, i, j].all() and p.edge_probs[i, j] == 1 and p.edge_probs[j, i] == 0
    for i, j in forbidden: assert not p.graphs[:, i, j].any() and p.edge_probs[i, j] == 0
    assert most is None or (p.graphs.sum(1) <= most).all()


def test_contradictions_are_refused():
    x = correlated(0, 4)
    for edges, said in (({"required": [[0, 1], [1, 2], [2, 0]]}, "cycle"), ({"required": [[0, 1]], "forbidden": [[0, 1]]}, "both required and forbidden"),
                        ({"forbidden": [[0, 9]]}, "is not a pair"), ({"required": [[1, 1]]}, "is not a pair")):
        with pytest.raises(InputError, match=said): sampled(x, **edges)
    with pytest.raises(InputError, match="max_parents"): sampled(x, config={**QUICK, "max_parents": 1}, required=[[0, 3], [1, 3]])


def test_relabelling_the_nodes_relabels_the_posterior():
    x, order = correlated(3, 5), torch.tensor([3, 0, 4, 1, 2])
    config = {"steps": 250, "chains": 24}
    p, q = sampled(x, config=config), sampled(x[:, order], seed=1, config=config)
    assert (p.edge_probs[order][:, order] - q.edge_probs).abs()[off(5)].mean() < .015


def test_it_is_the_exact_posterior_with_interventions():
    x = correlated(7, 5)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < .15
    p, truth = sampled(x, mask, config={"steps": 300, "chains": 24}), exact_posterior(x[None], mask[None])
    assert (p.edge_probs - truth.edge_probs[0]).abs()[off(5)].mean() < .01
    assert (p.edge_probs - exact_posterior(x[None]).edge_probs[0]).abs()[off(5)].mean() > .02  # the mask matters
    assert p.info["r_hat"] < 1.05


def test_every_limit_of_the_budget():
    x = MetaFixedDataset(load_benchmark("linear20-v1"), "a")[0].data
    stopped = sampled(x, budget=Budget(steps=7, samples=5))
    assert (stopped.info["steps"], stopped.info["stopped_by"], len(stopped.graphs)) == (7, "steps", 5)
    assert sampled(x[:, :3], budget=Budget(samples=5)).info["stopped_by"] == "samples"
    assert sampled(x[:, :3], budget=Budget(samples=500, steps=500, seconds=500)).info["stopped_by"] is None
    for seconds in (.001, .5):
        began = time.monotonic()
        p = sampled(x, budget=Budget(seconds=seconds), config={})
        assert time.monotonic() - began < 2 * seconds + 1  # the machine may be busy
        assert p.info["stopped_by"] == "seconds" and p.valid_dag_rate == 1 and p.edge_probs.isfinite().all()


def test_nothing_but_the_generator_is_random():
    before = torch.get_rng_state()
    sampled(correlated(0, 5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("d", [2, 40])
def test_few_and_many_nodes(d):
    p = sampled(correlated(1, d, 100), config={"steps": 12, "thin": 1, "chains": 2, "candidates": 6})
    assert is_dag(p.graphs).all() and p.edge_probs.shape == (d, d)
    if d == 2: assert abs(p.edge_probs[0, 1] - p.edge_probs[1, 0]) < .5


def expected_shd(graphs, truth): return ((graphs != truth) | (graphs != truth).mT).triu(1).flatten(1).sum(1).double().mean().item()


@pytest.mark.slow
def test_twenty_nodes_at_default_settings():
    "Two seeds agree with each other, and find the graph as well as samplers of this kind do."
    task = MetaFixedDataset(load_benchmark("linear20-v1"), "a")[0]
    p, q = (sampled(task.data, seed=s, config={}, n_samples=500) for s in (0, 1))
    assert (p.edge_probs - q.edge_probs).abs()[off(20)].mean() < .01
    above = p.edge_probs[task.graph][:, None] - p.edge_probs[~task.graph & off(20)][None]
    assert ((above > 0).double() + .5 * (above == 0)).mean() > .8
    assert expected_shd(p.graphs, task.graph) < 45


@pytest.mark.slow
def test_the_score_of_the_samples_is_the_score_of_the_posterior():
    "On five nodes, the mean log-score of drawn graphs is its exact expectation."
    x = correlated(11, 5)
    p, e = sampled(x, config={"steps": 800}, n_samples=4000), exact_posterior(x[None])
    scores = graph_scores(bge_local_scores(x[None]), p.graphs)[0]
    expected = (e.log_probs[0].exp() * (e.log_probs[0] + e.log_normaliser)).sum()
    assert abs(scores.mean() - expected) < 6 * scores.std() / 1000 ** .5


def sumu_probs(x, candidates):
    "Edge probabilities by sumu's partition sampler under the uniform prior; its candidates are chosen once."
    gadget, state = pytest.importorskip("sumu.gadget"), np.random.get_state()
    fair = gadget.LocalScore.precompute_prior
    gadget.LocalScore.precompute_prior = lambda self: setattr(self, "_prior", np.zeros(self.data.n))
    np.random.set_state(np.random.RandomState(0).get_state())
    try:
        families, _ = gadget.Gadget(data=gadget.Data(x.double().numpy(), discrete=False), scoref="bge", ess=10, max_id=-1, K=candidates, d=1, cp_algo="greedy-lite",
                                    mc3_chains=4, burn_in=2000, iterations=6000, thinning=12, tolerance=2 ** -32).sample()
    finally:
        gadget.LocalScore.precompute_prior = fair
        np.random.set_state(state)
    graphs = torch.zeros(len(families), x.shape[1], x.shape[1], dtype=torch.bool)
    for A, dag in zip(graphs, families):
        for family in dag:
            if len(family) > 1: A[list(family[1]), family[0]] = True
    assert is_dag(graphs).all()
    return graphs.double().mean(0)


@pytest.mark.peers
@pytest.mark.slow
def test_the_less_sumu_truncates_the_closer_it_comes():
    "Another partition sampler, same score and prior: what separates it from ours is the parents that it cannot reach, and so a few edges."
    task = MetaFixedDataset(load_benchmark("linear20-v1"), "a")[0]
    ours = sampled(task.data, config={}, n_samples=500).edge_probs
    few, more = (sumu_probs(task.data, k) for k in (6, 14))
    gap = lambda probs: (probs - ours).abs()[off(20)].mean()
    assert gap(more) < .75 * gap(few)
    assert few.sum() < more.sum() < ours.sum()
