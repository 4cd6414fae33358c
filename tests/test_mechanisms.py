"What must hold for every law of noise and every mechanism: finite values, densities that fit, and no dependence on neighbours in the batch."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from causal_meta.datasets.bge_linear import BGeLinear
from causal_meta.datasets.mechanisms import MECHANISMS, Linear, NeuralNet, row_noise
from causal_meta.datasets.noise import NOISE_LOG_PROBS, NOISES, noise_log_prob
from causal_meta.datasets.nonlinear import LINKS, LogisticMap, Periodic, PostNonlinear, Square
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.validation import InputError, parse

some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)
LAWS = sorted(NOISES)
KINDS = {"linear": Linear(), "linear bounded": Linear(low=.5, high=2.), "linear per_row": Linear(noise_scale="per_row"), "linear by_parents": Linear(noise_scale="by_parents"),
         "neural_net": NeuralNet(), "square": Square(), "periodic": Periodic(), "logistic_map": LogisticMap(), "logistic_map 5": LogisticMap(iterations=5),
         **{f"post_nonlinear {g}": PostNonlinear(g=g) for g in LINKS}, "post_nonlinear of square": PostNonlinear(g="tanh", inner=Square()), "bge_linear": BGeLinear()}
DENSE = {name: m for name, m in KINDS.items() if m.has_log_prob}
kinds, dense = st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(DENSE))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parent_sets(sizes: list[int]) -> torch.Tensor:
    "One graph (d, d) per size: its last node has that many parents, and no other node has any."
    d = max(sizes) + 1
    graphs = torch.zeros(len(sizes), d, d, dtype=torch.bool)
    for graph, k in zip(graphs, sizes): graph[d - 1 - k:d - 1, d - 1] = True
    return graphs


def drawn(mechanism, streams, k, n, law="gaussian", scale=1.):
    "Parameters, parents and noise of a node with k parents in each task."
    graphs = parent_sets([k]*len(streams))
    params = {name: v[:, -1] for name, v in mechanism.init(streams, graphs).items()}
    noise = {name: v[:, -1] for name, v in row_noise(mechanism, streams, "noise", n, k + 1, law).items()}
    parents = scale*streams.normal("noise/parents", (k, n))
    return params | mechanism.reference(params, parents), parents, noise


# the laws of noise

@some
@given(seed=seeds, law=st.sampled_from(LAWS), generator=st.sampled_from(["pcg64", "philox"]), picked=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
def test_noise_is_standardised_and_each_tasks_own(seed, law, generator, picked):
    streams = TaskStreams(seed, "test", "noise", tuple(range(10)), generator)
    u = NOISES[law](streams, "noise/test", (3000, 2))
    assert u.dtype == torch.float32 and u.isfinite().all()
    assert abs(u.mean()) < 5/60_000**.5 and abs(u.var() - 1) < (.2 if law == "student_t" else .06)
    assert torch.equal(NOISES[law](streams[picked], "noise/test", (3000, 2)), u[picked])
    assert torch.equal(NOISES[law](streams, "noise/test", (17, 2)), u[:, :17])


@some
@given(seed=seeds, law=st.sampled_from(sorted(NOISE_LOG_PROBS)))
def test_a_log_density_is_right_where_noise_falls(seed, law):
    "The density is the slope of the empirical distribution: KS against its integral."
    u = NOISES[law](TaskStreams(seed, "test", "noise", (0,)), "noise", (5000,))[0].double()
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    p = noise_log_prob(law)(grid).exp()
    below = torch.cumulative_trapezoid(p, grid)
    assert abs(below[-1] - 1) < 2e-3
    at = torch.bucketize(u, grid[1:]).clamp(max=len(below) - 1)
    assert kstest(below[at].numpy(), "uniform").pvalue > 1e-5


def test_the_ends_of_the_uniform_numbers():
    "A generator that returns 0 and 1 does no harm."
    class Ends(TaskStreams):
        def uniform(self, purpose, shape=(), low=0., high=1.): return torch.tensor([[low, high]]).expand(len(self), 2).clone()
    streams = Ends(0, "test", "noise", (0, 1), "philox")
    for law in ("laplace", "uniform", "gumbel", "cauchy"):
        u = NOISES[law](streams, "noise", (2,))
        assert u.isfinite().all() and (u[:, 0] < 0).all() and (u[:, 1] > 0).all()


def test_no_density_is_one_sentence():
    for mechanism in DENSE.values():
        params, parents, noise = drawn(mechanism, TaskStreams(0, "test", "m", (0,)), 2, 5)
        with pytest.raises(InputError, match=r"^noise cauchy: it has no density; those that have one are .*\.$"): mechanism.log_prob(params, parents, noise["u"], "cauchy")
    for mechanism in (NeuralNet(), LogisticMap()):
        with pytest.raises(InputError, match=r"no density that can be computed\.$"): mechanism.log_prob({}, parents, noise["u"], "gaussian")


# all mechanisms

def test_every_parametric_mechanism_is_tested_here():
    assert {m.type for m in KINDS.values()} <= set(MECHANISMS)


@some
@given(seed=seeds, name=kinds, law=st.sampled_from(LAWS), k=st.integers(0, 6), scale=st.sampled_from([0., 1e-3, 1., 30., 1e4]))
def test_values_are_finite_whatever_the_parents_are(seed, name, law, k, scale):
    params, parents, noise = drawn(KINDS[name], TaskStreams(seed, "test", name, (0, 1, 2)), k, 50, law, scale)
    x = KINDS[name].apply(params, parents, noise)
    assert x.shape == (3, 50) and x.dtype == torch.float32 and x.isfinite().all()
    if name in ("square", "periodic", "logistic_map", "logistic_map 5") or name.startswith("post"):  # bounded whatever is done to the parents
        assert x.abs().max() <= noise["u"].abs().max() + 27.01
    if k == 0 and name not in ("neural_net", "bge_linear"): assert torch.equal(x, noise["u"])


@some
@given(seed=seeds, name=kinds, sizes=st.lists(st.integers(0, 7), min_size=2, max_size=6), n=st.integers(1, 70), data=st.data())
def test_a_node_does_not_feel_its_batch(seed, name, sizes, n, data):
    "Parameters, own constants and values of tasks are the same alone, though neighbours have larger parent sets."
    mechanism, indices = KINDS[name], tuple(range(len(sizes)))
    streams, graphs = TaskStreams(seed, "test", name, indices), parent_sets(sizes)
    picked = data.draw(st.lists(st.sampled_from(indices), min_size=1, unique=True))
    params, few = mechanism.init(streams, graphs), mechanism.init(streams[picked], graphs[picked])
    for field in params:
        whole, part = params[field][picked], few[field]
        if part.dim() > 2: whole = whole[:, :, :part.shape[2]]  # slots that only the larger batch needs
        assert torch.equal(whole, part), field
    k = sizes[picked[0]]
    same = [i for i in indices if sizes[i] == k]  # a group of nodes, and its first member alone
    group = {f: v[same, -1] for f, v in params.items()}
    parents, noise = streams[same].normal("noise/parents", (k, n)), {f: v[same, -1] for f, v in row_noise(mechanism, streams, "noise", n, graphs.shape[-1]).items()}
    if n > 1: group |= mechanism.reference(group, parents)
    together = mechanism.apply(group, parents, noise)
    for i in range(len(same)):
        alone = {f: v[[i], -1] for f, v in ((f, params[f][same]) for f in params)}
        if n > 1: alone |= mechanism.reference(alone, parents[[i]])
        assert torch.equal(mechanism.apply(alone, parents[[i]], {f: v[[i]] for f, v in noise.items()})[0], together[i])


@some
@given(seed=seeds, name=kinds, k=st.integers(0, 4))
def test_apply_changes_none_of_its_arguments(seed, name, k):
    params, parents, noise = drawn(KINDS[name], TaskStreams(seed, "test", name, (0, 1)), k, 20)
    before = [t.clone() for t in (*params.values(), parents, *noise.values())]
    one, two = (KINDS[name].apply(params, parents, noise) for _ in range(2))
    assert torch.equal(one, two)
    if KINDS[name].has_log_prob: KINDS[name].log_prob(params, parents, one, "gaussian")
    assert all(torch.equal(a, b) for a, b in zip(before, (*params.values(), parents, *noise.values())))


@some
@given(seed=seeds, name=dense, law=st.sampled_from(sorted(NOISE_LOG_PROBS)), k=st.integers(0, 3))
def test_a_density_fits_what_is_drawn_and_integrates_to_one(seed, name, law, k):
    "One model, one row of parents, 4000 draws of the effect, against the integral of the density."
    mechanism = DENSE[name]
    params, parents, _ = drawn(mechanism, TaskStreams(seed, "test", name, (0,)), k, 100)
    parents = parents[..., :1].expand(-1, -1, 4000)
    noise = {f: v[:, 0] for f, v in row_noise(mechanism, TaskStreams(seed, "test", name, (0,)), "noise/fresh", 4000, 1, law).items()}
    x = mechanism.apply(params, parents, noise)[0].double()
    low, high = x.min().item(), x.max().item()
    width = 3*(high - low) + 1e-6
    grid = torch.linspace(low - width, high + width, 400_001, dtype=torch.float64)
    if name.startswith("post") and k:  # equal steps of c, and closer ones at the ends of the range
        grid = LINKS[mechanism.g].forward(3*torch.linspace(-9, 9, 400_002, dtype=torch.float64).tanh())
        grid = grid[torch.cat([grid.diff() > 0, torch.tensor([True])])]
    wide = {f: v.double() for f, v in params.items()}
    steps = [mechanism.log_prob(wide, parents[..., :1].double(), part[None], law)[0].exp() for part in grid.split(50_000)]
    p = torch.cat(steps)
    finite = p.where(p.isfinite(), 0.)
    below = torch.cumulative_trapezoid(finite, grid)
    assert abs(below[-1] - 1) < .02
    at = torch.bucketize(x, grid[1:]).clamp(max=len(below) - 1)
    assert kstest(below[at].numpy(), "uniform").statistic < 2.6/4000**.5


# what configurations refuse

@pytest.mark.parametrize("cls, values, message", [
    (Square, {"noise_sd": 0}, "greater than 0"), (Periodic, {"noise_sd": float("nan")}, "finite number"), (LogisticMap, {"iterations": 0}, "greater than or equal to 1"),
    (PostNonlinear, {"g": "cubic"}, "cube"), (PostNonlinear, {"inner": {"type": "logistic_map"}}, "inner mechanism logistic_map is not a function of standardised parents plus noise"),
    (PostNonlinear, {"inner": {"type": "bge_linear"}}, "inner mechanism bge_linear"), (PostNonlinear, {"inner": {"type": "lineal"}}, "did you mean 'linear'"),
    (Linear, {"noise_scale": "by_parent"}, "by_parents"), (LogisticMap, {"iteration": 2}, "did you mean 'iterations'")])
def test_what_a_configuration_refuses(cls, values, message):
    with pytest.raises(InputError, match=message): parse(cls, values, "mechanism")


def test_a_configuration_survives_json():
    for mechanism in KINDS.values():
        assert parse(type(mechanism), mechanism.model_dump(mode="json"), "mechanism") == mechanism
    assert Linear().model_dump_json() == '{"type":"linear","weight_scale":10.0,"low":null,"high":null,"noise_scale":"per_node","gamma_shape":2.5,"gamma_scale":2.5}'
