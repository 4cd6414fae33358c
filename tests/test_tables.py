"Each way in which a user's table can be wrong gives exactly one sentence, and never a traceback of ours."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_meta.datasets.tables import read_table
from causal_meta.datasets.validation import InputError

BAD = {
    "text": ("a,b\n1,low\n2,high\n", "column 'b' holds text in line 2 ('low')"),
    "text later": ("a,b\n1,2\n2,3\n3,x\n", "column 'b' holds text in line 4 ('x')"),
    "empty cell": ("a,b\n1,2\n2,\n", "column 'b' has no value in line 3"),
    "NaN": ("a,b\n1,2\nNaN,3\n", "column 'a' has no value in line 3"),
    "a row of holes": ("a,b\n1,2\n,\n3,4\n", "column 'a' has no value in line 3"),
    "infinity": ("a,b\n1,2\ninf,3\n", "column 'a' holds too large a number in line 3"),
    "overflow": ("a,b\n1,2\n1e39,3\n", "column 'a' holds too large a number in line 3"),
    "constant": ("a,b\n1,7\n2,7\n", "column 'b' is constant (7 in every row)"),
    "duplicate": ("a,b,a\n1,2,3\n2,3,4\n", "two columns are called 'a'"),
    "nameless": (",a,b\n0,1,2\n1,2,3\n", "column 1 has no name"),
    "one row": ("a,b\n1,2\n", "at least two rows are needed, found 1"),
    "no row": ("a,b\n", "at least two rows are needed, found 0"),
    "empty": ("", "is empty"),
    "blank": ("\n  \n", "is empty"),
    "one variable": ("a\n1\n2\n", "at least two variables are needed, found a"),
    "short row": ("a,b\n1,2\n3\n", "line 3 has 1 cells; the header has 2"),
    "long row": ("a,b\n1,2\n3,4,5\n", "line 3 has 3 cells; the header has 2"),
    "decimal commas": ("a;b\n1,5;2\n2,5;3\n", "column 'a' holds text in line 2 ('1,5')"),
}


def refusal(path, **kwargs) -> str:
    with pytest.raises(InputError) as caught: read_table(path, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("text, says", BAD.values(), ids=BAD.keys())
def test_one_sentence(tmp_path, text, says):
    path = tmp_path/"cells.csv"
    path.write_text(text)
    sentence = refusal(path)
    assert says in sentence and sentence.startswith("cells.csv")
    assert sentence.endswith(".") and "\n" not in sentence and str(tmp_path) not in sentence


def test_what_is_not_a_text_file(tmp_path):
    assert "there is no such file" in refusal(tmp_path/"none.csv")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path/"sheet.xlsx").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    assert "not a text file" in refusal(tmp_path/"sheet.xlsx")


def test_targets(tmp_path):
    path = tmp_path/"cells.csv"
    path.write_text("raf,mek,erk,target,batch\n1,2,3,,x\n2,3,5,NA,x\n4,4,9,raf,y\n3,1,2,raf+mek,y\n")
    table = read_table(path, target_column="target", ignore=["batch"])
    assert table.names == ["raf", "mek", "erk"]
    assert table.intervened.int().tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert "no target column 'tgt'" in refusal(path, target_column="tgt")
    assert "no column to ignore 'bach'; did you mean 'batch'?" in refusal(path, ignore=["bach"])
    path.write_text("raf,mek,target\n1,2,\n2,3,\n3,4,erk\n")
    assert "line 4 has the unknown target 'erk'" in refusal(path, target_column="target")


def test_constant_where_observed(tmp_path):
    path = tmp_path/"cells.csv"
    path.write_text("raf,mek,target\n1,2,\n1,3,\n9,4,raf\n")
    assert "'raf' is constant (1 in every row where it is not intervened on)" in refusal(path, target_column="target")
    path.write_text("raf,mek,target\n1,2,raf\n1,3,raf\n9,4,raf\n")
    assert "'raf' is intervened on in every row" in refusal(path, target_column="target")


@pytest.mark.parametrize("text", ["a,b\r\n1,2\r\n3,4\r\n", "\ufeffa,b\n1,2\n3,4\n", "a;b\n1;2\n3;4\n", "a\tb\n1\t2\n3\t4", "\na, b\n\n1, 2\n3, 4\n\n", '"a","b"\n"1","2"\n3,4\n'])
def test_dialects(tmp_path, text):
    path = tmp_path/"cells.csv"
    path.write_bytes(text.encode("utf-8"))
    table = read_table(path)
    assert table.names == ["a", "b"] and table.data.tolist() == [[1, 2], [3, 4]]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab1\r.,;\t\n\" -\0é", max_size=60))
def test_never_anything_but_an_input_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz")/"cells.csv"
    path.write_text(text, encoding="utf-8")
    try: table = read_table(path)
    except InputError as error: assert "\n" not in str(error).replace("\\n", "")
    else: assert np.isfinite(table.data.numpy()).all() and len(set(table.names)) == table.data.shape[1] >= 2
