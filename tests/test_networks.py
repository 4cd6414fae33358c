"The published linear-Gaussian networks: against pgmpy's own reading of them, and as families of tasks."
import json
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch

from causal_meta.datasets import networks
from causal_meta.datasets.graphs import is_dag
from causal_meta.datasets.networks import NETWORKS, NetworkGraph, NetworkLinear, joint_gaussian, network, weights_by_slot
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.scm import SCMFamily, log_prob
from causal_meta.datasets.validation import InputError, parse

needs_pgmpy = pytest.mark.skipif(find_spec("pgmpy") is None, reason="pgmpy, which carries the networks, is not installed")
each = pytest.mark.parametrize("name", NETWORKS)


def family(name, **more):
    return parse(SCMFamily, {"graph": {"type": "network", "name": name}, "mechanism": {"type": "network_linear", "name": name}, "standardise": "none"} | more, "family")


def streams(*indices): return TaskStreams(0, "test", "networks", indices)


@needs_pgmpy
@pytest.mark.parametrize("name, nodes, edges, parents", [("ecoli70", 46, 70, 4), ("magic-niab", 44, 66, 9), ("magic-irri", 64, 102, 11), ("arth150", 107, 150, 6)])
def test_sizes(name, nodes, edges, parents):
    net = network(name)
    assert (net.d, net.adjacency.sum().item(), net.adjacency.sum(0).max().item()) == (nodes, edges, parents)
    assert len(set(net.names)) == nodes and is_dag(net.adjacency) and net.adjacency.dtype == torch.bool
    assert torch.equal(net.weights != 0, net.adjacency) and (net.sds > 0).all() and net.weights.dtype == torch.float64
    assert network(name) is net and "pgmpy" in net.source


@needs_pgmpy
@each
def test_against_pgmpy(name):
    from pgmpy.models import LinearGaussianBayesianNetwork
    model, net = LinearGaussianBayesianNetwork.load(str(networks._network_file(name))), network(name)
    assert set(model.edges()) == {(net.names[i], net.names[j]) for i, j in net.adjacency.nonzero().tolist()} and set(model.nodes()) == set(net.names)
    for j, node in enumerate(net.names):
        cpd = model.get_cpds(node)
        assert cpd.beta[0] == net.intercepts[j].item() and cpd.std == pytest.approx(net.sds[j].item(), rel=1e-12)
        assert list(cpd.beta[1:]) == [net.weights[net.names.index(p), j].item() for p in cpd.evidence]
    order = [list(nx.topological_sort(model)).index(n) for n in net.names]
    mean, cov = model.to_joint_gaussian()
    ours = joint_gaussian(net)
    assert np.allclose(ours[0], mean[order], atol=1e-6) and np.allclose(ours[1], cov[np.ix_(order, order)], atol=1e-6)


@needs_pgmpy
@each
def test_samples_have_the_closed_moments(name):
    n, (mean, cov) = 20_000, joint_gaussian(network(name))
    x = family(name).sample(streams(3), network(name).d).sample(n)[0].double()
    z = (x.mean(0) - mean)/cov.diag().sqrt()*n**.5
    zz = (x.T.cov() - cov)/((cov**2 + cov.diag().outer(cov.diag()))/n).sqrt()
    assert z.abs().max() < 4.5 and zz.abs().max() < 5.5


@needs_pgmpy
@each
def test_log_prob_is_that_of_the_joint_gaussian(name):
    models = family(name).sample(streams(0, 1), network(name).d)
    x, (mean, cov) = models.sample(50).double(), joint_gaussian(network(name))
    expected = torch.distributions.MultivariateNormal(mean, cov).log_prob(x)
    assert torch.allclose(log_prob(models, x).double(), expected, atol=1e-3)


@needs_pgmpy
def test_an_intervention_has_its_total_effect():
    net, n = network("ecoli70"), 20_000
    target = net.names.index("sucA")
    models = family("ecoli70").sample(streams(0), net.d)
    before, after = (models.sample(n, do=do)[0].double() for do in (None, {target: 5.}))
    assert (after[:, target] == 5).all()
    effects = torch.linalg.inv(torch.eye(net.d, dtype=torch.float64) - net.weights)[target]
    affected = effects != 0
    affected[target] = False
    assert affected.sum() > 5 and torch.equal(before[:, effects == 0], after[:, effects == 0]), "only descendants change"
    cut = net.weights.clone()
    cut[:, target] = 0
    shift = net.intercepts.clone()
    shift[target] = 5
    mean = torch.linalg.inv(torch.eye(net.d, dtype=torch.float64) - cut).T @ shift
    assert ((after.mean(0) - mean)[affected].abs() < 5*after.std(0)[affected]/n**.5).all()


@needs_pgmpy
def test_tasks_share_the_model_and_nothing_else():
    models = family("magic-niab").sample(streams(0, 1, 2), 44)
    x = models.sample(30)
    assert all(t[0].equal(t[1]) for t in models.params[0].values()) and not x[0].equal(x[1])
    assert x[1:].equal(family("magic-niab").sample(streams(1, 2), 44).sample(30))
    assert x[2].equal(models[2].sample(30)[0])


@needs_pgmpy
@each
def test_weights_by_slot(name):
    net, slots = network(name), weights_by_slot(network(name))
    for j in range(net.d):
        own = net.weights[net.adjacency[:, j], j].float()
        assert slots[j, :len(own)].equal(own) and not slots[j, len(own):].any()


@needs_pgmpy
def test_refusals():
    with pytest.raises(InputError, match="ecoli70 has 46 nodes, but 20 are asked for"): family("ecoli70").sample(streams(0), 20)
    other = family("ecoli70", graph={"type": "er", "edges": 70})
    with pytest.raises(InputError, match="coefficients of ecoli70 fit its own graph only"): other.sample(streams(0), 46)
    other = family("ecoli70", graph={"type": "network", "name": "arth150"})
    with pytest.raises(InputError, match="fit its own graph only"): other.sample(streams(0), 107)
    with pytest.raises(InputError, match="standardise: none"): family("ecoli70", standardise="internal")


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean 'ecoli70'"): network("ecoli")
    for cls in (NetworkGraph, NetworkLinear):
        with pytest.raises(InputError, match="did you mean 'arth150'"): parse(cls, {"name": "arth15"}, "network")


@pytest.fixture
def fresh():
    "Nothing remembered before or after."
    network.cache_clear()
    yield
    network.cache_clear()


def test_without_pgmpy(fresh, monkeypatch):
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "causal_meta\[networks\]"'): network("ecoli70")
    with pytest.raises(InputError, match="not installed"): family("ecoli70").sample(streams(0), 46)


def test_another_pgmpy(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(InputError, match="does not carry the network ecoli70"): network("ecoli70")
    (tmp_path/"utils"/"example_models").mkdir(parents=True)
    (tmp_path/"utils"/"example_models"/"ecoli70.json").write_text(json.dumps({"nodes": [], "arcs": [], "cpds": {}}))
    with pytest.raises(InputError, match="has other contents"): network("ecoli70")


@needs_pgmpy
def test_pgmpy_is_never_imported():
    code = "import sys; from causal_meta.datasets.networks import network; network('arth150'); sys.exit('pgmpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
