"""Embeddings in files are read, and damaged ones are named."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from synface.synthesis import read_embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_are_read(tmp_path, dtype):
    rows = torch.randn(5, 3).to(dtype)
    save_file({"anything": rows}, tmp_path / "one.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "one.safetensors"), rows.float())
    save_file({"embeddings": rows, "other": rows[:1].clone()}, tmp_path / "two.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "two.safetensors"), rows.float())
    if dtype != torch.bfloat16:
        for i, array in enumerate((rows.numpy(), np.asfortranarray(rows), rows.numpy()[::-1])):
            np.save(tmp_path / f"{i}.npy", array)
            got = read_embeddings(tmp_path / f"{i}.npy")
            assert torch.equal(got, torch.from_numpy(array.astype(np.float32)))


def npy(array, **options):
    return lambda path: np.save(path, array, **options)


def tensors(**named):
    return lambda path: save_file(named, path)


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def header(text: str):
    return content(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)
    )


DESCRIBED = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"
LIE = (
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 512), }"
)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.npy", None, "cannot be read: No such file"),
        ("x.txt", content(b""), r"expected a \.safetensors or \.npy file, got '\.txt'"),
        ("x.npy", content(b""), "not a whole .npy array"),
        ("x.npy", content(LIE.ljust(127) + b"\n" + bytes(64)), "not a whole .npy array"),
        ("x.npy", header("(" * 5000), "not a whole .npy array"),
        ("x.npy", header("-" * 9000), "not a whole .npy array"),
        ("x.npy", header("{[]: 1}"), "not a whole .npy array"),
        ("x.npy", header(DESCRIBED.format("'<f4'", "(True, 2)")), "not a whole .npy array"),
        ("x.npy", header(DESCRIBED.format("()", "(1, 2)")), "not a whole .npy array"),
        ("x.npy", npy(np.array([{}]), allow_pickle=True), "not a whole .npy array"),
        ("x.npy", lambda p: np.savez(p.open("wb"), a=np.eye(2)), "an archive of arrays"),
        ("x.npy", npy(np.arange(6).reshape(2, 3)), r"floating point .* got int64 \(2, 3\)"),
        ("x.npy", npy(np.ones(6)), r"shape \(N, D\), got float32 \(6,\)"),
        ("x.npy", npy(np.ones((0, 6))), r"got float32 \(0, 6\)"),
        ("x.npy", npy(np.array([[1.0, 2], [np.nan, 1]])), "1 of 2 rows are not finite.* row 1"),
        ("x.npy", npy(np.array([[1e300, 2]])), "1 of 1 rows are not finite in float32"),
        ("x.npy", npy(np.array([[1.0], [0], [0]])), "2 of 3 rows are zero .* row 1"),
        ("x.safetensors", content(b"\xff" * 99), "is not a safetensors file"),
        ("x.safetensors", None, "cannot be read"),
        ("x.safetensors", tensors(a=torch.ones(2), b=torch.ones(1)), r"got 2 \(a, b\)"),
        ("x.safetensors", tensors(a=torch.ones(2, 2).int()), r"got int32 \(2, 2\)"),
    ],
)
def test_embeddings_that_cannot_be_read(tmp_path, name, make, message):
    if make:
        make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / name)


@given(st.data(), st.sampled_from([".npy", ".safetensors"]))
def test_damaged_embeddings_raise_nothing_but_a_value_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    rows = torch.ones(4, 3)
    np.save(path, rows.numpy()) if suffix == ".npy" else save_file({"e": rows}, path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        message = f"{path.name} {read_embeddings(path).ndim}"
    except ValueError as error:
        message = str(error)
    assert path.name in message
