"Real data: the download is tried on a local copy, the contents on the real file where there is one."
import functools
import http.server
import io
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pooch
import pytest

from causal_meta.datasets import real, syntren
from causal_meta.datasets.real import SACHS, DataFile, expected_path, fetch, load_sachs, sachs_graph
from causal_meta.datasets.syntren import SYNTREN, SYNTREN_ARRAYS, load_syntren, loose_files
from causal_meta.datasets.validation import InputError

needs_sachs = pytest.mark.skipif(not expected_path(SACHS).exists(), reason=f"CAUSAL_META_DATA names no folder with {SACHS.place}")
needs_syntren = pytest.mark.skipif(not all(expected_path(f).exists() for i in SYNTREN_ARRAYS for f in loose_files(i)),
                                   reason="CAUSAL_META_DATA names no folder with the SynTReN sets 1 to 5")


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        Quiet.requests += 1
        super().do_GET()

    def log_message(self, *args): pass


@pytest.fixture
def site(tmp_path):
    "A web server on this machine with one file, as a `DataFile`."
    folder = tmp_path/"site"
    folder.mkdir()
    (folder/"cells.txt").write_text("raf\tmek\n1.0\t2.0\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield DataFile("small/cells.txt", f"http://127.0.0.1:{server.server_port}/cells.txt", pooch.file_hash(str(folder/"cells.txt")), "CC0-1.0")
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty download cache, and no data folder."
    monkeypatch.delenv("CAUSAL_META_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(real.pooch, "os_cache", lambda name: tmp_path/"cache"/name)
    return tmp_path/"cache"/"causal_meta"


def changed(file: DataFile, **values) -> DataFile:
    return DataFile(**{**file.__dict__, **values})


def test_download_once(site, cache):
    before = Quiet.requests
    path = fetch(site)
    assert path == cache/"small"/"cells.txt" and path.read_text().startswith("raf\tmek")
    assert fetch(site) == path and Quiet.requests == before + 1


def test_wrong_checksum(site, cache):
    with pytest.raises(InputError, match="is not the file this version was made for"): fetch(changed(site, sha256="0"*64))
    assert not list(cache.rglob("cells.txt*")), "a refused download must not stay"


def test_no_such_page_and_no_network(site, cache):
    with pytest.raises(InputError, match=r"cannot download .*HTTPError.*get it by hand"): fetch(changed(site, url=site.url + "x"))
    with pytest.raises(InputError, match=r"cannot download .*ConnectionError.*get it by hand"): fetch(changed(site, url="http://127.0.0.1:9/cells.txt"))


def test_data_folder(site, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_META_DATA", str(tmp_path/"data"))
    before = Quiet.requests
    with pytest.raises(InputError, match="has no 'small/cells.txt'"): fetch(site)
    (tmp_path/"data"/"small").mkdir(parents=True)
    (tmp_path/"data"/"small"/"cells.txt").write_text("raf\tmek\n1.0\t2.0\n")
    assert fetch(site) == tmp_path/"data"/"small"/"cells.txt"
    (tmp_path/"data"/"small"/"cells.txt").write_text("raf\tmek\n1.0\t2.5\n")
    with pytest.raises(InputError, match="cells.txt was changed"): fetch(site)
    assert Quiet.requests == before, "a data folder is never completed by a download"


def test_changed_in_the_cache(site, cache):
    fetch(site).write_text("nothing")
    with pytest.raises(InputError, match="cells.txt was changed"): fetch(site)


def test_graphs():
    consensus, published = sachs_graph("consensus17"), sachs_graph("published20")
    assert (consensus.sum(), published.sum(), (consensus & published).sum()) == (17, 20, 16)
    for graph in (consensus, published): assert np.linalg.matrix_power(graph.int().numpy(), 11).sum() == 0, "a cycle"


def test_refused_before_anything_is_read(cache):
    for wrong in ({"graph": "bnlearn"}, {"rows": "some"}, {"transform": "log2"}):
        with pytest.raises(InputError, match="allowed:"): load_sachs(**wrong)


@needs_sachs
@pytest.mark.parametrize("rows, n, disturbed", [("observational", 853, 0), ("inhibitors", 5846, 4091), ("all", 7466, 5711)])
def test_sachs_rows(rows, n, disturbed):
    sachs = load_sachs(rows=rows)
    assert sachs.data.shape == sachs.intervened.shape == (n, 11) and len(sachs.conditions) == n
    assert sachs.intervened.any(1).sum() == disturbed and sachs.intervened.sum(1).max() <= 1
    assert (~sachs.intervened.any(1)).sum() == n - disturbed == {"observational": 853}.get(rows, 853 + 902)
    assert sachs.data.isfinite().all() and sachs.source.endswith("(CC0-1.0)") and "log(x + 10)" in sachs.preprocessing


@needs_sachs
@pytest.mark.parametrize("graph, edges", [("consensus17", 17), ("published20", 20)])
def test_sachs_rows_do_not_depend_on_the_graph(graph, edges):
    sachs, other = load_sachs(graph, "inhibitors"), load_sachs(rows="inhibitors")
    assert sachs.graph.sum() == edges and sachs.graph_name == graph
    assert sachs.data.equal(other.data) and sachs.intervened.equal(other.intervened)


@needs_sachs
def test_sachs_targets():
    "The number of cells under each target, without and with the activators."
    for rows, counts in (("inhibitors", {"akt": 911, "pkc": 723, "pip2": 810, "mek": 799, "pip3": 848}),
                         ("all", {"akt": 911, "pkc": 723 + 913, "pip2": 810, "mek": 799, "pip3": 848, "pka": 707})):
        sachs = load_sachs(rows=rows)
        assert {n: c for n, c in zip(sachs.names, sachs.intervened.sum(0).tolist()) if c} == counts


@needs_sachs
def test_sachs_scale():
    raw, logged = load_sachs(rows="all", transform="none"), load_sachs(rows="all")
    assert np.allclose(np.log(raw.data.double().numpy() + 10), logged.data.numpy(), atol=1e-4)
    copy = expected_path(SACHS).parent/"sachs_7466_conditions_targets.csv"
    if not copy.exists(): pytest.skip("no derived copy to compare with")
    lines = [line.split(",") for line in copy.read_text().splitlines()]
    assert (raw.data.numpy() == np.array([line[:11] for line in lines[1:]], dtype=np.float32)).all()
    names = [",".join(n for n, hit in zip(raw.names, row) if hit) for row in raw.intervened.tolist()]
    assert names == [line[12] for line in lines[1:]] and lines[0][:11] == raw.names


@pytest.fixture
def syntren_zip(tmp_path, monkeypatch):
    "A small zip with the right members, on this machine's own web server; gives back its arrays."
    folder = tmp_path/"syntren_site"
    folder.mkdir()
    rng, made = np.random.default_rng(0), {}
    for i in (1, 6, 7): made[f"data{i}"], made[f"DAG{i}"] = rng.standard_normal((500, 20)), np.eye(20, k=1) + (i == 7)*np.eye(20, k=-1)
    with zipfile.ZipFile(folder/"some.zip", "w") as archive:
        for name, array in made.items():
            np.save(buffer := io.BytesIO(), np.asfortranarray(array))
            archive.writestr(f"syntren/{name}.npy", buffer.getvalue())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(syntren, "SYNTREN", replace(SYNTREN, url=f"http://127.0.0.1:{server.server_port}/some.zip", sha256=pooch.file_hash(str(folder/"some.zip"))))
    yield made
    server.shutdown()
    server.server_close()


def test_syntren_from_the_zip(syntren_zip, cache):
    before = Quiet.requests
    for i in (1, 6):
        loaded = load_syntren(i)
        assert np.array_equal(loaded.data.numpy(), syntren_zip[f"data{i}"].astype(np.float32)) and np.array_equal(loaded.graph.numpy(), syntren_zip[f"DAG{i}"] == 1)
        assert loaded.data.is_contiguous() and loaded.graph_name == f"syntren{i}"
    assert Quiet.requests == before + 1 and [p.name for p in cache.rglob("*") if p.is_file()] == ["syntren_p20.zip"]
    with pytest.raises(InputError, match="set 7 is not 500 rows of 20 genes with an acyclic graph"): load_syntren(7)


def test_syntren_zip_with_other_bytes(syntren_zip, cache, monkeypatch):
    monkeypatch.setattr(syntren, "SYNTREN", replace(syntren.SYNTREN, sha256="0"*64))
    with pytest.raises(InputError, match="is not the file this version was made for"): load_syntren(1)
    assert not list(cache.rglob("*.zip"))


def test_syntren_data_folder(syntren_zip, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_META_DATA", str(tmp_path/"data"))
    before = Quiet.requests
    with pytest.raises(InputError, match="neither 'syntren/data1.npy' with 'syntren/DAG1.npy', nor 'syntren/syntren_p20.zip'; get the zip from http"): load_syntren(1)
    with pytest.raises(InputError, match="has no 'syntren/syntren_p20.zip'; get the zip from http"): load_syntren(6)
    (tmp_path/"data"/"syntren").mkdir(parents=True)
    for name in ("data1", "DAG1"): np.save(tmp_path/"data"/"syntren"/f"{name}.npy", syntren_zip[name])
    with pytest.raises(InputError, match="data1.npy was changed"): load_syntren(1)
    for file in (tmp_path/"data"/"syntren").iterdir(): file.unlink()
    (tmp_path/"data"/"syntren"/"syntren_p20.zip").write_bytes((tmp_path/"syntren_site"/"some.zip").read_bytes())
    assert np.array_equal(load_syntren(1).data.numpy(), syntren_zip["data1"].astype(np.float32))
    assert Quiet.requests == before, "a data folder is never completed by a download"


@pytest.mark.parametrize("wrong", [0, 11, -1, 1.5, "2", None, True])
def test_syntren_numbers(wrong, cache):
    with pytest.raises(InputError, match="allowed: 1 to 10"): load_syntren(wrong)


@needs_syntren
@pytest.mark.parametrize("index, edges", [(1, 24), (2, 22), (3, 26), (4, 34), (5, 23)])
def test_syntren(index, edges):
    one = load_syntren(index)
    assert one.data.shape == one.intervened.shape == (500, 20) and one.data.isfinite().all() and not one.intervened.any()
    assert one.names[0] == "g1" and one.names[-1] == "g20" and len(one.conditions) == 500 and "(MIT)" in one.source
    assert one.graph.sum() == edges and np.linalg.matrix_power(one.graph.int().numpy(), 20).sum() == 0
