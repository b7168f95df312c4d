"""TOML that is written reads as the same values."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given
from synface.common.toml import read_toml, toml_text, write_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.hypothesis
@given(values=st.dictionaries(TEXT, VALUES, max_size=4))
def test_values_survive(values, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "values.toml"
    file.write_text(toml_text(values), encoding="utf-8", newline="")
    read = read_toml(file)
    assert read == values
    as_json = (json.dumps(v, sort_keys=True) for v in (read, values))
    assert next(as_json) == next(as_json)  # where True is not 1


def test_tables_follow_plain_values():
    values = {"table": {"inner": {"x": 1}, "name": 'a"b'}, "sizes": (1, 2.5), "on": True}
    assert toml_text(values) == (
        'sizes = [1, 2.5]\non = true\n\n[table]\nname = "a\\"b"\n\n[table.inner]\nx = 1\n'
    )
    assert toml_text({}) == ""


def test_what_toml_cannot_say(tmp_path):
    write_toml(tmp_path / "file.toml", {"lr": 0.1, "resume": None})
    assert read_toml(tmp_path / "file.toml") == {"lr": 0.1}
    with pytest.raises(TypeError, match=r"a\.b must be a string.*got None"):
        toml_text({"a": {"b": None}})
