"Mechanisms by probabilistic programs: NUTS and the variational guide against closed forms, interventions, budgets, and a global state that stays as it was."
import math
import time

import pyro
import pytest
import torch

from causal_meta.datasets.validation import InputError
from causal_meta.models.base import Budget, from_graphs
from causal_meta.models.pyro_gp import GPPrior, PyroGPConfig, PyroGPSCM
from causal_meta.models.pyro_inference import structures
from causal_meta.models.pyro_scm import LinearPrior, PyroLinearConfig, PyroLinearSCM, conjugate_posterior, coordinates, linear_log_joint, regressions
from causal_meta.models.set_scores import set_scores

CHAIN = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
COLLIDER = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()
WEIGHTS = torch.tensor([[0, 1.2, 0], [0, 0, -.8], [0, 0, 0]], dtype=torch.float64)


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def simulate(n: int, seed: int, share: float = 0., do: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    "Rows of a linear chain 0 -> 1 -> 2 with intercepts 0, .5, 1 and noise .7; some values set at random."
    g, x = seeded(seed), torch.zeros(n, 3, dtype=torch.float64)
    was_set = torch.rand(n, 3, generator=g) < share
    for j in range(3):
        x[:, j] = x @ WEIGHTS[:, j] + .5*j + .7*torch.randn(n, generator=g, dtype=torch.float64)
        x[:, j] = torch.where(was_set[:, j], 2*torch.randn(n, generator=g, dtype=torch.float64), x[:, j])
        if do and j in do: x[:, j] = do[j]
    return x, was_set


def bent(n: int, seed: int, do: float | None = None) -> torch.Tensor:
    "Rows of 0 -> 1 -> 2 in which the first mechanism is a cosine."
    e = torch.randn(n, 3, generator=seeded(seed), dtype=torch.float64)
    x0 = e[:, 0] if do is None else torch.full((n,), do, dtype=torch.float64)
    x1 = 2*(1.5*x0).cos() + .4*e[:, 1]
    return torch.stack([x0, x1, x1 + .4*e[:, 2]], 1)


def closed_form(posterior, data, was_set):
    "Means and sds of intercepts and weights, (M, d + 1) each, and the mean of 1/s^2."
    s = posterior.structures
    r = regressions(data, was_set, s.nodes, s.parents)
    truth = conjugate_posterior(r, LinearPrior())
    place = lambda t: torch.zeros(len(s.nodes), 4, dtype=torch.float64).scatter_add(1, r.slots + 1, t*r.used)
    return place(truth.mean), place(truth.covariance.diagonal(dim1=1, dim2=2).sqrt()), truth.shape/truth.rate, truth.shape.sqrt()/truth.rate


def check_against_closed_form(posterior, data, was_set, standard_errors):
    mean, sd, tau, tau_sd = closed_form(posterior, data, was_set)
    got = torch.cat([posterior.draws["intercept"][..., None], posterior.draws["weights"]], 2)
    root, used = posterior.diagnostics["ess"]**.5, sd > 0
    assert ((got.mean(0) - mean)/sd)[used].abs().max()*root < standard_errors
    assert (got.std(0)/sd - 1)[used].abs().max()*root < 2*standard_errors  # of a sd: (2 ESS)^-1/2, of squares, which mix more slowly and have heavy tails
    assert ((posterior.draws["scale"].pow(-2).mean(0) - tau)/tau_sd).abs().max()*root < standard_errors
    assert not got.mean(0)[~used].any()


@pytest.mark.parametrize("share", [0., .25])
def test_nuts_finds_the_closed_form(share):
    data, was_set = simulate(50, 0, share)
    both = from_graphs(torch.stack([CHAIN, COLLIDER]))
    got = PyroLinearSCM(PyroLinearConfig(method="nuts")).fit(both, data, was_set, n_samples=600, generator=seeded(1))
    check_against_closed_form(got, data, was_set, 4.5)
    assert got.diagnostics["r_hat"] < 1.03 and got.diagnostics["divergences"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("graph", [CHAIN, COLLIDER], ids=["chain", "collider"])
@pytest.mark.parametrize("whiten", [True, False])
def test_nuts_with_many_draws(graph, whiten):
    data, was_set = simulate(50, 2, .25)
    got = PyroLinearSCM(PyroLinearConfig(method="nuts", whiten=whiten, chains=32)).fit(graph, data, was_set, n_samples=8000, generator=seeded(3))
    check_against_closed_form(got, data, was_set, 4.5)
    assert got.diagnostics["r_hat"] < 1.01 and got.diagnostics["divergences"] == 0


def test_an_intervened_value_does_not_inform_its_own_mechanism():
    data, was_set = simulate(200, 4)
    data[:100, 1], was_set[:100, 1] = 10., True
    exact = PyroLinearSCM(PyroLinearConfig(method="exact"))
    got = exact.fit(CHAIN, data, was_set, n_samples=500, generator=seeded(5))
    alone = exact.fit(CHAIN, data[100:], n_samples=500, generator=seeded(5))
    torch.testing.assert_close(got.draws["weights"][:, 1], alone.draws["weights"][:, 1], rtol=1e-9, atol=1e-9)  # node 1 has only the other rows
    assert got.draws["weights"][:, 2, 1].std() < .5*alone.draws["weights"][:, 2, 1].std()  # node 2 learns from the set values


@pytest.mark.parametrize("prior", [LinearPrior(), LinearPrior(type="independent")], ids=["bge", "independent"])
def test_coordinates_do_not_change_the_density(prior):
    data, was_set = simulate(40, 6, .2)
    r = regressions(data, was_set, torch.arange(3), COLLIDER.T)
    turned, plain = coordinates(r, prior), coordinates(r, prior, whiten=False)
    z = torch.randn(3, 4, generator=seeded(7), dtype=torch.float64)
    z[:2, 1:3] = 0  # padded
    beta, tau = turned(z)
    back = torch.cat([torch.linalg.solve(plain.turn, (beta - plain.centre)[..., None])[..., 0], ((tau.log() - plain.level)/plain.spread)[:, None]], 1)
    a = linear_log_joint(r, prior, turned)(z) - turned.log_volume
    b = linear_log_joint(r, prior, plain)(back) - plain.log_volume
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-8)


def test_the_bound_is_below_the_evidence_and_close_in_whitened_coordinates():
    data, _ = simulate(100, 8)
    got = PyroLinearSCM(PyroLinearConfig(method="svi", iterations=120)).fit(CHAIN, data, n_samples=500, generator=seeded(9))
    gap = set_scores(data).graphs(CHAIN).item() - got.diagnostics["elbo"]
    assert -.05 < gap < .3  # the ELBO of the last steps is an average over draws
    mean, sd, *_ = closed_form(got, data, torch.zeros_like(data, dtype=torch.bool))
    assert (got.draws["weights"].mean(0) - mean[:, 1:]).abs().max() < .3*sd.max()


def test_do_cuts_the_node_off():
    data, _ = simulate(4000, 10)
    got = PyroLinearSCM(PyroLinearConfig(method="exact")).fit(CHAIN, data, n_samples=1000, generator=seeded(11))
    rows = got.predict_do({1: 3.}, 20000, seeded(12))
    world, _ = simulate(20000, 13, do={1: 3.})
    assert (rows[:, 1] == 3).all()
    assert (rows.mean(0) - world.mean(0)).abs().max() < .05 and (rows.std(0) - world.std(0)).abs().max() < .05
    assert (got.interventional_mean({1: 3.}).mean(0) - world.mean(0)).abs().max() < .05
    seen = got.predict(20000, seeded(14))
    assert (torch.cov(seen.T) - torch.cov(data.T)).abs().max() < .15


def test_a_posterior_over_graphs_shares_mechanisms():
    data, _ = simulate(80, 15)
    cyclic = CHAIN | CHAIN.T
    samples = from_graphs(torch.stack([CHAIN, COLLIDER, CHAIN, cyclic]), torch.tensor([.1, .4, .3, .2]).log())
    s = structures(samples, 3)
    assert (len(s.graphs), len(s.nodes)) == (2, 5) and abs(s.cyclic - .2) < 1e-6
    got = PyroLinearSCM(PyroLinearConfig(method="exact")).fit(samples, data, n_samples=3000, generator=seeded(16))
    assert abs((got.graphs == CHAIN).flatten(1).all(1).double().mean() - .5) < .001
    new, _ = simulate(25, 17)
    one = [PyroLinearSCM(PyroLinearConfig(method="exact")).fit(G, data, n_samples=3000, generator=seeded(18)).log_predictive(new) for G in (CHAIN, COLLIDER)]
    average = torch.stack(one).logsumexp(0) - math.log(2)
    assert (got.log_predictive(new) - average).abs().max() < .05
    assert abs((got.log_prob(new).logsumexp(0) - math.log(3000) - average).mean()) < .05
    scores = [set_scores(torch.cat([data, row[None]])).graphs(CHAIN) - set_scores(data).graphs(CHAIN) for row in new]
    assert (one[0] - torch.stack(scores)).abs().max() < .1
    targets = torch.tensor([False, True, False])
    assert (got.log_prob(new, targets) - got.log_prob(new)).abs().max() > 0
    assert not got.log_predictive(new, ~torch.zeros_like(new, dtype=torch.bool)).abs().max() > 1e-9


@pytest.mark.parametrize("method", ["nuts", "svi"])
def test_the_seed_decides_and_nothing_global_moves(method):
    data, _ = simulate(30, 19)
    model, before, store = PyroLinearSCM(PyroLinearConfig(method=method, warmup=6, iterations=12)), torch.get_rng_state(), pyro.get_param_store()
    with store.scope():
        pyro.param("mine", torch.ones(()))
        a, b, c = (model.fit(CHAIN, data, n_samples=32, generator=seeded(s)) for s in (20, 20, 21))
        a.predict_do({0: 1.}, 9, seeded(22))
        assert list(store.keys()) == ["mine"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.draws[k], b.draws[k]) for k in a.draws) and not torch.equal(a.draws["scale"], c.draws["scale"])


@pytest.mark.parametrize("build", [PyroLinearSCM, PyroGPSCM])
@pytest.mark.parametrize("method", ["nuts", "svi"])
def test_budgets(build, method, capfd):
    data, config = bent(40, 23), PyroLinearConfig if build is PyroLinearSCM else PyroGPConfig
    model = build(config(method=method, warmup=5000, iterations=10000))
    for seconds in (1e-6, .3):
        start = time.monotonic()
        got = model.fit(CHAIN, data, n_samples=2000, generator=seeded(24), budget=Budget(seconds=seconds))
        assert time.monotonic() - start < 1.1*seconds + .4
        assert got.diagnostics["stopped_by"] == "seconds" and got.log_prob(data[:5]).isfinite().all()
    got = model.fit(CHAIN, data, n_samples=2000, generator=seeded(25), budget=Budget(steps=4))
    assert (got.diagnostics["stopped_by"], got.diagnostics["steps"]) == ("steps", 4)
    small = build(config(method=method, warmup=3, iterations=5)).fit(CHAIN, data, n_samples=50, generator=seeded(26), budget=Budget(samples=9))
    assert small.diagnostics["stopped_by"] == "samples" and len(small) == 9
    assert capfd.readouterr() == ("", "")


def test_refusals():
    data, _ = simulate(30, 27)
    g, linear, gp = seeded(28), PyroLinearSCM(), PyroGPSCM()
    fitted = PyroLinearSCM(PyroLinearConfig(method="exact")).fit(CHAIN, data, n_samples=9, generator=g)
    for call, message in [
        (lambda: linear.fit(CHAIN | CHAIN.T, data, generator=g), "has a directed cycle"),
        (lambda: linear.fit(from_graphs((CHAIN | CHAIN.T)[None]), data, generator=g), "every sampled graph has a directed cycle"),
        (lambda: linear.fit(CHAIN[:2], data, generator=g), "it must be \\(3, 3\\)"),
        (lambda: linear.fit(CHAIN, data[:1], generator=g), "at least 2 are needed"),
        (lambda: gp.fit(CHAIN, data[:4], generator=g), "at least 5 are needed"),
        (lambda: gp.fit(CHAIN, data, torch.tensor([False, True, False]).expand(30, 3), generator=g), "node 1 was left alone in 0 rows"),
        (lambda: gp.fit(CHAIN, data.repeat(50, 1), generator=g), "at most 1000"),
        (lambda: fitted.predict_do({5: 0.}, 3, g), "names node 5, but the model has the nodes 0 to 2"),
        (lambda: fitted.predict(0, g), "at least 1"),
        (lambda: fitted.log_prob(data[:, :2]), "they must be \\(n, 3\\)"),
        (lambda: fitted.log_prob(data, torch.zeros(2)), "targets have shape"),
    ]:
        with pytest.raises(InputError, match=message): call()
    for config in ({"method": "hmc"}, {"method": "exact", "prior": {"type": "independent"}}, {"chain": 3}):
        with pytest.raises(ValueError): PyroLinearConfig(**config)


def test_a_gaussian_process_follows_the_curve_and_a_line_does_not():
    data, inner = bent(60, 29), torch.linspace(-1.5, 1.5, 25, dtype=torch.float64)
    curve = PyroGPSCM(PyroGPConfig(method="svi", iterations=60)).fit(CHAIN, data, n_samples=40, generator=seeded(30))
    x = torch.zeros(1, 25, 3, dtype=torch.float64)
    x[0, :, 0] = inner
    mean, sd = curve.conditional(1, torch.arange(40), x, noise=False)
    truth = 2*(1.5*inner).cos()
    assert (mean.mean(0) - truth).abs().mean() < .3
    assert ((mean.mean(0) - truth).abs() < 3*(sd.square().mean(0) + mean.var(0)).sqrt()).double().mean() > .9
    line = PyroLinearSCM(PyroLinearConfig(method="exact")).fit(CHAIN, data, n_samples=200, generator=seeded(31))
    do = {0: 2.}
    world = bent(4000, 32, do=2.)[:, 2].mean()
    error = [abs(p.predict_do(do, 4000, seeded(33))[:, 2].mean() - world) for p in (curve, line)]
    assert error[0] < .5 and error[1] > 1.
    assert curve.log_predictive(bent(50, 34)).mean() > line.log_predictive(bent(50, 34)).mean() + .5


def test_a_gaussian_process_in_other_units_is_the_same():
    data = bent(40, 35)
    moved = data*torch.tensor([1., 100., .01]) + torch.tensor([5., 0., -3.])
    model = PyroGPSCM(PyroGPConfig(method="svi", iterations=5))
    a, b = (model.fit(CHAIN, x, n_samples=20, generator=seeded(36)) for x in (data, moved))
    difference = a.log_prob(data[:7]) - b.log_prob(moved[:7].double())
    assert (difference - math.log(100*.01)).abs().max() < 1e-3  # data are kept in float32
    assert torch.equal(a.parameters["lengthscale"].isfinite(), a.graphs)


@pytest.mark.slow
def test_nuts_on_kernels_agrees_with_a_grid():
    "A node without parents: signal and noise only, integrated on a grid."
    data, prior = bent(20, 37), GPPrior()
    got = PyroGPSCM(PyroGPConfig(method="nuts")).fit(torch.zeros(3, 3), data, n_samples=4000, generator=seeded(38))
    y = ((data - data.mean(0))/data.std(0))[:, 0]
    a, b = (t.flatten() for t in torch.meshgrid(*[torch.linspace(-4, 4, 161, dtype=torch.float64)]*2, indexing="ij"))
    signal, noise = (prior.spread*a + math.log(prior.signal)).exp(), (prior.spread*b + math.log(prior.noise)).exp()
    K = signal[:, None, None]**2 + (noise**2 + 1e-6)[:, None, None]*torch.eye(20, dtype=torch.float64)
    log = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=torch.float64), K).log_prob(y) - (a**2 + b**2)/2
    w, root = log.softmax(0), got.diagnostics["ess"]**.5
    for grid, draws in ((signal.log(), got.draws["signal"][:, 0]), (noise.log(), got.draws["noise"][:, 0])):
        log_draws = (draws/data[:, 0].std()).log()
        mean = (w*grid).sum()
        sd = (w*(grid - mean)**2).sum().sqrt()
        assert abs(log_draws.mean() - mean)/sd*root < 4.5 and abs(log_draws.std()/sd - 1) < .12
    assert got.diagnostics["r_hat"] < 1.02
