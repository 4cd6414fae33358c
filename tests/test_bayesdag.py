"""BayesDAG: what one example in the notebook cannot show."""
from __future__ import annotations

import json
import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.graphs import enumerate_dags, is_dag
from causal_meta.datasets.streams import standardise
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.datasets.validation import InputError
from causal_meta.models.base import Budget, Posterior, build_model
from causal_meta.models.bayesdag import (BayesDAGConfig, LinearMechanism, Walker, edge_effects, joint_chains, linear_data, log_likelihood, marginal_chains, order_mask,
                                         pairwise_force, regressions, sinkhorn_force)
from causal_meta.models.permutations import best_positions

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2 ** 32)
KINDS = {"marginal": {}, "joint": {"inference": "joint"}, "original": {"original": True}, "nonlinear": {"mechanism": "nonlinear", "hidden": 16}}
kinds = pytest.mark.parametrize("kind", KINDS)


def gen(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


def some_data(seed: int, n: int = 60, d: int = 4) -> torch.Tensor:
    g = gen(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) * torch.randn(d, generator=g).exp() + torch.randn(d, generator=g)


def ask(kind, data, intervened=None, *, n_samples=25, seed=0, budget=None, **config):
    return build_model("bayesdag", {"steps": 30, **KINDS[kind], **config}).posterior(data, intervened, n_samples=n_samples, generator=gen(seed), budget=budget)


@few
@given(seed=seeds, d=st.integers(2, 12))
def test_the_mask_is_the_hungarian_permutation_of_a_triangle(seed, d):
    p = torch.randn(6, d, generator=gen(seed))
    P = torch.nn.functional.one_hot(best_positions(p[..., None] * torch.arange(1, d + 1)), d).float()
    assert torch.equal(P @ torch.ones(d, d).triu(1) @ P.mT, order_mask(p))
    coins = torch.rand(6, d, d, generator=gen(seed)) < .7
    assert is_dag(coins & order_mask(p.round()).bool()).all(), "with ties too"


@few
@given(seed=seeds, d=st.integers(2, 8))
def test_forces_follow_a_relabelling_and_feel_only_differences(seed, d):
    g = gen(seed)
    p, c, new = .1 * torch.randn(3, d, generator=g).double(), torch.randn(3, d, d, generator=g).double(), torch.randperm(d, generator=g)
    there = pairwise_force(p, c, 50.)
    torch.testing.assert_close(pairwise_force(p[:, new], c[:, new][:, :, new], 50.), there[:, new])
    torch.testing.assert_close(pairwise_force(p + 3, c, 50.), there, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(there.sum(1), torch.zeros(3).double(), atol=1e-9, rtol=0)
    relabelled = sinkhorn_force(p[:, new], c[:, new][:, :, new], 50.)
    torch.testing.assert_close(relabelled, sinkhorn_force(p, c, 50.)[:, new], atol=1e-3, rtol=1e-2)


def test_one_step_of_the_sampler_by_hand():
    x, V, m, grad = torch.tensor([.5, -2.]), torch.tensor([4., .09]), torch.tensor([.1, -.3]), torch.tensor([3., -.2])
    walker = Walker(x.clone(), V.clone(), m.clone())
    walker.step(grad, gen(5), noise=.7)
    h, epsilon = 3e-4 ** .5, torch.randn(2, generator=gen(5))
    V = .99 * V + .01 * grad ** 2
    G = 1 / (1e-8 + (1e-8 + V) ** .5) ** .5
    m = .9 * m + h * G * grad + .7 * math.sqrt(2 * h * (.1 / h - h / 2)) * epsilon
    torch.testing.assert_close((walker.second, walker.momentum, walker.x), (V, m, x - h * G * m))


def test_a_quadratic_potential_gives_a_gaussian():
    centre, sd, g = torch.tensor([1., -2.]), torch.tensor([.2, .5]), gen(0)
    many = Walker.at(torch.zeros(3000, 2))
    many.second = many.second + 1 / sd.square()
    for _ in range(2500): many.step((many.x - centre) / sd.square(), g, memory=1.)
    assert ((many.x.mean(0) - centre).abs() < 4.5 * sd / 3000 ** .5).all()
    assert ((many.x.std(0) / sd - 1).abs() < 4.5 / 6000 ** .5 + .01).all()


@few
@given(seed=seeds, some=st.booleans())
def test_edge_effects_are_differences_of_log_evidence(seed, some):
    x, g = standardise(some_data(seed)[None])[0][0], gen(seed)
    mask = torch.rand(x.shape, generator=g) < .2 if some else None
    m = linear_data(x, mask)
    dags = enumerate_dags(4)[torch.randint(543, (8,), generator=g)].double()

    def evidence(graphs):
        r = regressions(m, graphs)
        return -(m.rows - 1) / 2 * r.residual.log() + torch.logdet(r.inverse) / 2

    worth = edge_effects(m, dags)
    for i in range(4):
        for j in range(4):
            if i == j: continue
            on, off = dags.clone(), dags.clone()
            on[:, i, j], off[:, i, j] = 1, 0
            torch.testing.assert_close(worth[:, i, j], (evidence(on) - evidence(off))[:, j], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["marginal", "joint"])
def test_rows_in_which_a_node_was_set_do_not_touch_its_own_term(part):
    x, g = some_data(3, n=80), gen(0)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:20, 2] = True
    y = x.clone()
    y[:20, 2] += 10 * torch.randn(20, generator=g)
    graphs = order_mask(torch.randn(5, 4, generator=g))
    if part == "marginal":
        terms = [regressions(linear_data(t, mask), graphs.double()).residual for t in (x, y)]
        graphs = graphs.double()
    else:
        mechanism = LinearMechanism(4)
        theta, log_sigma = mechanism.init(5, g), torch.zeros(5, 4)
        terms = [log_likelihood(t, (~mask).float(), mechanism.predict(theta, t, graphs), log_sigma) for t in (x, y)]
    torch.testing.assert_close(terms[0][:, 2], terms[1][:, 2], rtol=1e-5, atol=1e-5)
    children = graphs[:, 2] > 0
    assert children.any() and ((terms[0] - terms[1]).abs()[children] > 1e-2).all(), "they do count for its children"


@kinds
def test_the_contract(kind, tmp_path):
    data = some_data(1)
    post = ask(kind, data)
    assert post.graphs.shape == (25, 4, 4) and is_dag(post.graphs).all() and post.info["stopped_by"] is None
    assert torch.isfinite(post.edge_probs).all() and (post.edge_probs >= 0).all() and (post.edge_probs <= 1).all()
    assert ((post.edge_probs + post.edge_probs.mT) <= 1 + 1e-5).all()
    assert all(len(v) == 25 and torch.isfinite(v).all() for k, v in post.parameters.items() if k not in ("mean", "sd"))
    json.dumps(post.info, allow_nan=False)
    back = Posterior.load(post.save(tmp_path / "one.safetensors"))
    assert torch.equal(back.graphs, post.graphs) and back.info == post.info
    again, other = ask(kind, data), ask(kind, data, seed=1)
    assert torch.equal(again.graphs, post.graphs) and torch.equal(again.edge_probs, post.edge_probs)
    assert all(torch.equal(again.parameters[k], v) for k, v in post.parameters.items())
    assert not torch.equal(other.edge_probs, post.edge_probs)


@kinds
def test_no_global_randomness(kind):
    before = torch.random.get_rng_state()
    ask(kind, some_data(1))
    assert torch.equal(before, torch.random.get_rng_state())


@kinds
def test_budgets(kind):
    data = some_data(2)
    assert (post := ask(kind, data, budget=Budget(steps=3))).info["stopped_by"] == "steps" and post.info["steps"] == 3 and len(post.graphs) == 25
    assert (post := ask(kind, data, budget=Budget(seconds=1e-9))).info["stopped_by"] == "seconds" and post.info["steps"] == 1 and len(post.graphs) == 25
    assert (post := ask(kind, data, budget=Budget(samples=4))).info["stopped_by"] == "samples" and len(post.graphs) == 4
    assert (post := ask(kind, data, budget=Budget(steps=30))).info["stopped_by"] is None
    assert len(ask(kind, data, n_samples=1, budget=Budget(samples=4)).graphs) == 1
    clock = Budget().clock()
    assert ask(kind, data, steps=10 ** 6, budget=Budget(seconds=.3)).info["stopped_by"] == "seconds"
    assert clock.seconds < .3 * 1.1 + .4


@kinds
def test_awkward_data(kind):
    for data in (some_data(0, n=2), some_data(0, n=3, d=2), torch.zeros(20, 3), torch.cat([some_data(0)[:, :2]] * 2, 1), 1e4 * some_data(4)):
        post = ask(kind, data, steps=15)
        assert torch.isfinite(post.edge_probs).all() and is_dag(post.graphs).all()
    data, everywhere = some_data(0), torch.zeros(60, 4).bool()
    everywhere[:, 1] = True
    assert torch.isfinite(ask(kind, data, everywhere).edge_probs).all(), "a node that was set in every row"


def test_bad_input():
    data = some_data(0)
    for bad, mask in ((data[0], None), (data[:1], None), (data[:, :1], None), (data * float("nan"), None), (data, torch.zeros(3, 3).bool()), (data, torch.ones_like(data).bool())):
        with pytest.raises(InputError): ask("marginal", bad, mask)
    for config in ({"sparsty": 1}, {"mechanism": "quadratic"}, {"mechanism": "nonlinear", "inference": "marginal"}, {"chains": 0}, {"burn_in": 1.}):
        with pytest.raises(InputError): build_model("bayesdag", config)


def test_the_presets():
    assert BayesDAGConfig(original=True).relaxation == "sinkhorn" and BayesDAGConfig(original=True, chains=3).chains == 3
    assert BayesDAGConfig(original=True, mechanism="nonlinear").inference == "joint"
    assert BayesDAGConfig(sparsity=1, sparsity_per_log_n=.5).penalty(100) == pytest.approx(1 + .5 * math.log(100))
    x, mask = some_data(0), torch.zeros(60, 4).bool()
    assert marginal_chains(x, mask, BayesDAGConfig(chains=3), gen()).coins.shape == (3, 4, 4)
    assert joint_chains(x, mask, BayesDAGConfig(mechanism="nonlinear", chains=3), gen()).p.x.shape == (3, 4)


def test_interventions_orient_an_edge():
    g = gen(0)
    cause = torch.randn(200, generator=g)
    mask = torch.zeros(200, 2).bool()
    mask[:60, 1], mask[60:120, 0] = True, True
    effect = cause + .5 * torch.randn(200, generator=g)
    effect[:60] = 2 * torch.randn(60, generator=g)
    data = torch.stack([cause, effect], 1)
    blind, seen = ask("marginal", data[120:], steps=800), ask("marginal", data, mask, steps=800)
    assert .2 < blind.edge_probs[0, 1] < .8 and seen.edge_probs[0, 1] > .97


@pytest.mark.slow
def test_the_marginal_chain_reaches_its_own_target_at_five_nodes():
    dags = enumerate_dags(5)
    orders = sum((~(dags & ~(torch.tensor(o)[:, None] < torch.tensor(o))).flatten(1).any(1)).double() for o in permutations(range(5)))
    for index in (0, 1, 2):
        x = MetaFixedDataset(load_benchmark("exact5-v1"), "b")[index].data
        m = linear_data(standardise(x[None])[0][0])
        r = regressions(m, dags.double())
        evidence = -((m.rows - 1) / 2 * r.residual.log()).sum(1) + torch.logdet(r.inverse).sum(1) / 2
        want = torch.einsum("k,kij->ij", (evidence + orders.log()).softmax(0), dags.double())
        got = build_model("bayesdag", {"steps": 4000, "sparsity": 0}).posterior(x, n_samples=100, generator=gen()).edge_probs
        assert (got - want).abs().sum() / 20 < .04
