"Real data: the download is tried on a local copy, the contents on the real file where there is one."
import functools
import http.server
import threading

import numpy as np
import pooch
import pytest

from causal_meta.datasets import real
from causal_meta.datasets.real import SACHS, DataFile, expected_path, fetch, load_sachs, sachs_graph
from causal_meta.datasets.validation import InputError

needs_sachs = pytest.mark.skipif(not expected_path(SACHS).exists(), reason=f"CAUSAL_META_DATA names no folder with {SACHS.place}")


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
    assert sachs.data.isfinite().all() and sachs.source.endswith("(CC0-1.0)") and "log(x + 10)" in sachs.preprocessing


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
