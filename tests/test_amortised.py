"""The symmetries and promises of the amortised models, on random shapes: what a single example in a notebook cannot show."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import causal_meta.models.avici  # noqa: F401
import causal_meta.models.bcnp  # noqa: F401
import causal_meta.models.pairformer  # noqa: F401
from causal_meta.datasets.graphs import is_dag
from causal_meta.models.avici import break_cycles, mean_bce, spectral_radius
from causal_meta.models.base import MODELS, Budget, Posterior, build_model, pair_mask
from causal_meta.models.bcnp import mixture_loss, mixture_terms
from causal_meta.models.permutations import best_positions, sinkhorn, task_gumbel

MODELS_UNDER_TEST = ("avici", "bcnp", "pairformer")
INPUTS = st.sampled_from(["plain", "asinh", "moments"])
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
many = settings(max_examples=60, deadline=None)


def model_of(name, **config):
    torch.manual_seed(0)
    return build_model(name, {"size": "tiny", **config}).eval()


def tasks(B, n, d, seed, intervened=.1):
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(B, d, generator=g).argsort(-1)
    graphs = (torch.rand(B, d, d, generator=g) < .5) & (order[:, :, None] < order[:, None, :])
    return SimpleNamespace(data=torch.randn(B, n, d, generator=g), graphs=graphs, intervened=torch.rand(B, n, d, generator=g) < intervened,
                           node_mask=torch.ones(B, d).bool(), keys=[("er", "train", seed*100 + b) for b in range(B)])


def off_diagonal(logits):
    return logits[..., ~torch.eye(logits.shape[-1]).bool()]


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
@few
@given(B=st.integers(1, 3), n=st.integers(1, 12), d=st.integers(2, 7), seed=st.integers(0, 10_000), inputs=INPUTS)
def test_relabelling_the_nodes_relabels_the_logits(name, B, n, d, seed, inputs):
    model, batch = model_of(name, inputs=inputs), tasks(B, n, d, seed)
    new = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    expected = model.edge_logits(batch.data, batch.intervened)[:, new][:, :, new]
    found = model.edge_logits(batch.data[..., new], batch.intervened[..., new])
    torch.testing.assert_close(off_diagonal(found), off_diagonal(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
@few
@given(n=st.integers(1, 15), d=st.integers(2, 6), seed=st.integers(0, 10_000), inputs=INPUTS)
def test_shuffling_the_rows_changes_nothing(name, n, d, seed, inputs):
    model, batch = model_of(name, inputs=inputs), tasks(2, n, d, seed)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    expected, found = model.edge_logits(batch.data, batch.intervened), model.edge_logits(batch.data[:, rows], batch.intervened[:, rows])
    torch.testing.assert_close(off_diagonal(found), off_diagonal(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
@few
@given(d=st.integers(2, 6), extra=st.integers(1, 6), seed=st.integers(0, 10_000), garbage=st.sampled_from([0., 1e4, float("nan")]), inputs=INPUTS)
def test_padding_leaves_no_trace(name, d, extra, seed, garbage, inputs):
    model, batch = model_of(name, inputs=inputs), tasks(2, 9, d, seed)
    place = torch.randperm(d + extra, generator=torch.Generator().manual_seed(seed))[:d].sort().values  # real nodes anywhere
    wide = SimpleNamespace(data=torch.full((2, 9, d + extra), garbage), intervened=torch.ones(2, 9, d + extra).bool(), keys=batch.keys,
                           graphs=torch.zeros(2, d + extra, d + extra).bool(), node_mask=torch.zeros(2, d + extra).bool())
    wide.data[..., place], wide.intervened[..., place], wide.node_mask[:, place] = batch.data, batch.intervened, True
    wide.graphs[:, place[:, None], place] = batch.graphs
    found = model.edge_logits(wide.data, wide.intervened, wide.node_mask)
    torch.testing.assert_close(off_diagonal(found[:, place][:, :, place]), off_diagonal(model.edge_logits(batch.data, batch.intervened)), atol=1e-5, rtol=1e-5)
    assert torch.isneginf(found[~pair_mask(wide.node_mask)]).all()
    torch.testing.assert_close(model.loss(wide).total, model.loss(batch).total, atol=1e-4, rtol=1e-4)
    p = model.posterior(wide.data, wide.intervened, node_mask=wide.node_mask, n_samples=5, generator=torch.Generator().manual_seed(0))[0]
    assert p.d == d and p.graphs.shape == (5, d, d)


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_a_loss_is_the_mean_of_the_losses_of_its_tasks(name):
    model, batch = model_of(name), tasks(5, 20, 4, 3)
    single = [model.loss(SimpleNamespace(**{k: v[b:b + 1] for k, v in vars(batch).items()})).total for b in range(5)]
    torch.testing.assert_close(model.loss(batch).total, torch.stack(single).mean(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_the_library_leaves_the_global_random_state_alone(name):
    model, batch = model_of(name, **({"dropout": 0.} if "dropout" in MODELS[name].config_class.model_fields else {})).train(), tasks(2, 10, 4, 3)
    before = torch.get_rng_state()
    model.loss(batch).total.backward()
    model.after_step(10)
    model.posterior(batch.data, n_samples=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_a_posterior_is_a_function_of_its_generator(name):
    model, batch = model_of(name), tasks(3, 10, 4, 3)
    def draw(seed):
        return model.posterior(batch.data, n_samples=20, generator=torch.Generator().manual_seed(seed))
    one, two, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a.graphs, b.graphs) for a, b in zip(one, two))
    assert not all(torch.equal(a.graphs, b.graphs) for a, b in zip(one, other))


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_samples_agree_with_edge_probabilities_and_survive_a_file(name, tmp_path):
    model, batch = model_of(name, **({"head": "dags"} if name == "pairformer" else {})), tasks(2, 10, 4, 3)  # with both heads, each has its own
    p = model.posterior(batch.data, n_samples=5000, generator=torch.Generator().manual_seed(0))[1]
    torch.testing.assert_close(p.graphs.float().mean(0), p.edge_probs, atol=.035, rtol=0)
    q = Posterior.load(p.save(tmp_path/"p.safetensors"))
    assert torch.equal(p.graphs, q.graphs) and torch.equal(p.edge_probs, q.edge_probs)
    assert p.log_prob(batch.graphs[1]) == q.log_prob(batch.graphs[1])


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_a_budget_of_samples_is_kept_and_named(name):
    model, batch = model_of(name), tasks(1, 10, 4, 3)
    p = model.posterior(batch.data, n_samples=50, generator=torch.Generator().manual_seed(0), budget=Budget(samples=7))[0]
    assert len(p.graphs) == 7 and p.info["stopped_by"] == "samples"


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_bfloat16_gives_finite_losses_and_gradients(name):
    model, batch = model_of(name).train(), tasks(2, 10, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16): loss = model.loss(batch)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
def test_every_parameter_gets_a_gradient(name):
    model, batch = model_of(name).train(), tasks(4, 30, 5, 3)
    model.loss(batch).total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", MODELS_UNDER_TEST)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_sizes_build_and_overrides_hold(name, size):
    setting, value = ("heads", 2) if name == "pairformer" else ("dropout", .25)
    model = build_model(name, {"size": size, setting: value})
    assert getattr(model.config, setting) == value and model.config.size == size and MODELS[name].kind == "amortised"


@many
@given(d=st.integers(1, 8), density=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_spectral_radius_is_that_of_numpy(d, density, seed):
    rng = np.random.default_rng(seed)
    P = rng.uniform(size=(d, d)) * (rng.uniform(size=(d, d)) < density)
    assert abs(float(spectral_radius(torch.tensor(P))) - np.abs(np.linalg.eigvals(P)).max()) < 3e-3  # eigvals itself errs on defective P


@many
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_spectral_radius_of_two_nodes_is_the_geometric_mean(a, b):
    assert abs(float(spectral_radius(torch.tensor([[0, a], [b, 0]], dtype=torch.float64))) - (a*b)**.5) < 2e-4


@many
@given(d=st.integers(2, 15), seed=st.integers(0, 10_000))
def test_spectral_radius_of_a_dag_is_zero(d, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(d, generator=g)
    P = torch.rand(d, d, generator=g).triu(1)[order][:, order]
    assert 0 <= float(spectral_radius(P)) < 2e-3


def test_the_acyclicity_term_pulls_on_the_weights():
    model, batch = model_of("avici").train(), tasks(4, 20, 4, 0)
    plain = torch.autograd.grad(model.loss(batch).total, model.embed.weight)[0]
    model.dual.fill_(1.)
    pulled = torch.autograd.grad(model.loss(batch).total, model.embed.weight)[0]
    assert (plain - pulled).norm() > 1e-4 * plain.norm()


def test_the_dual_variable_is_in_the_checkpoint():
    model, batch = model_of("avici", dual_every=1, dual_warmup=0).train(), tasks(2, 10, 4, 0)
    for step in (1, 2, 3):
        model.loss(batch)
        model.after_step(step)
    twin = model_of("avici", dual_every=1, dual_warmup=0).train()
    twin.load_state_dict(model.state_dict())
    assert float(twin.dual) == float(model.dual) > 0
    for m in (model, twin): m.after_step(4)
    assert float(twin.dual) == float(model.dual)


@many
@given(d=st.integers(2, 8), density=st.floats(.1, 1), seed=st.integers(0, 10_000))
def test_broken_cycles_leave_a_dag_and_spare_acyclic_graphs(d, density, seed):
    g = torch.Generator().manual_seed(seed)
    probs = torch.rand(1, d, d, generator=g) * (1 - torch.eye(d))
    graphs = (torch.rand(1, 6, d, d, generator=g) < density) & ~torch.eye(d).bool()
    fixed = break_cycles(graphs, probs)
    acyclic = is_dag(graphs)
    assert is_dag(fixed).all() and not (fixed & ~graphs).any()
    assert torch.equal(fixed[acyclic], graphs[acyclic])


@few
@given(d=st.integers(1, 8), scale=st.floats(.1, 3), seed=st.integers(0, 10_000))
def test_sinkhorn_is_doubly_stochastic(d, scale, seed):
    q = sinkhorn(scale * torch.randn(5, d, d, generator=torch.Generator().manual_seed(seed)), 1e-4, 10_000)
    torch.testing.assert_close(q.sum(-1), torch.ones(5, d), atol=2e-4, rtol=0)
    torch.testing.assert_close(q.sum(-2), torch.ones(5, d), atol=2e-4, rtol=0)


def test_sinkhorn_of_a_matrix_does_not_depend_on_its_neighbours():
    scores = torch.randn(20, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.linspace(.1, 8, 20)[:, None, None]
    assert torch.equal(sinkhorn(scores)[3], sinkhorn(scores[3:4])[0])


@many
@given(d=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_positions_are_permutations(d, seed):
    found = best_positions(torch.randn(2, 3, d, d, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(found.sort(-1).values, torch.arange(d).expand(2, 3, d))


def test_noise_depends_on_every_part_of_the_key():
    mask = torch.ones(1, 4).bool()
    base, *others = [task_gumbel([key], mask, 3, seed) for key, seed in
                     [(("er", "train", 1), 0), (("sf", "train", 1), 0), (("er", "validation", 1), 0), (("er", "train", 2), 0), (("er", "train", 1), 1)]]
    assert not any(torch.equal(base, other) for other in others)


@few
@given(k=st.integers(1, 6), cost=st.floats(8, 16))
def test_half_a_plus_half_b_scores_log_two(k, cost):
    truth = torch.diag(torch.ones(k), 1).bool()
    logits = torch.where(truth | truth.T, 60., -60.)[None]
    orders = torch.stack([torch.ones(k + 1, k + 1).triu(1), torch.ones(k + 1, k + 1).tril(-1)])[None]
    terms = mixture_terms(logits, orders, truth[None], pair_mask(torch.ones(1, k + 1).bool()), cost)
    assert abs(float(mixture_loss(terms, "joint")) - np.log(2)) < k*(k + 1) * np.exp(-cost) + 1e-5  # a probability of 1 is held below 1 by exp(-cost)
    assert float(mixture_loss(terms, "marginal")) > (2*k - .1) * np.log(2)


def test_cross_entropy_ignores_the_diagonal_and_the_padding():
    pairs = pair_mask(torch.tensor([[True, True, False]]))
    logits = torch.full((1, 3, 3), float("nan")).masked_fill(pairs, 0.)
    assert abs(float(mean_bce(logits, torch.ones(1, 3, 3).bool(), pairs)) - np.log(2)) < 1e-6
