"""Files that are no models are refused in one line that names the file and what is wrong with it."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import save_gguf

from alignpro.errors import ModelError
from alignpro.models.gguf.header import Header, read_header
from alignpro.models.gguf.reading import ReadModel

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(file)
    return file.read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def written(file: Path, architecture: str = "llama", **entries: Any) -> Header:
    """Write a file with some metadata and one tensor, and read its header."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in entries.items():
        writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(file)


def test_it_says_what_the_reader_of_gguf_py_says(file: Path, whole: bytes) -> None:
    file.write_bytes(whole)
    header, reader = read_header(file), gguf.GGUFReader(file)
    assert header.metadata.keys() == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in header.metadata.items():
        assert value == reader.fields[key].contents()
    expected = [(t.name, tuple(t.shape.tolist())[::-1], t.tensor_type, t.data_offset) for t in reader.tensors]
    assert [(t.name, t.shape, t.quantization, t.offset) for t in header.tensors] == expected


@pytest.mark.parametrize("length", [4, 20, 24, 100, 3000])
def test_a_file_that_ends_in_its_header_is_damaged(length: int, file: Path, whole: bytes) -> None:
    file.write_bytes(whole[:length])
    with pytest.raises(ModelError, match=rf"model.gguf: is damaged or truncated: .*{length:,}; download it again"):
        read_header(file)


def test_a_file_that_ends_in_its_tensors_is_truncated(file: Path, whole: bytes) -> None:
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"is damaged or truncated: tensor \S+ ends at byte"):
        read_header(file)


@pytest.mark.parametrize("position", range(8, 2000, 83))
def test_a_damaged_header_raises_no_other_error(position: int, file: Path, whole: bytes) -> None:
    file.write_bytes(whole[:position] + b"\xff" * 9 + whole[position + 9 :])
    try:
        read_header(file)
    except ModelError as error:
        assert "model.gguf: " in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 a wheel", "is not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "is a GGUF file of version 1"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "does not name its architecture"),
    ],
)
def test_other_files_are_named(content: bytes, reason: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"model.gguf: {reason}"):
        read_header(file)


def test_arrays_within_arrays_end_somewhere(file: Path) -> None:
    def array(depth: int) -> bytes:
        return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQI", 4, 1, 7)

    def whole(depth: int) -> bytes:
        key = b"a.b"
        return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<I", 9) + array(depth)

    file.write_bytes(whole(2))
    with pytest.raises(ModelError, match="does not name its architecture"):  # so the arrays were read
        read_header(file)
    file.write_bytes(whole(100_000))
    with pytest.raises(ModelError, match=r"model.gguf: is damaged or truncated: it has arrays within arrays"):
        read_header(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere.gguf: cannot be read: No such file"):
        read_header(tmp_path / "nowhere.gguf")


def test_a_part_of_a_model_is_named(file: Path) -> None:
    with pytest.raises(ModelError, match="is one of 3 parts of a model; join them"):
        written(file, **{"split.count": 3})


def test_a_quantization_that_is_not_known_is_named(file: Path, whole: bytes) -> None:
    """`Q8_K` is a format of intermediate results, which gguf-py knows by name only."""
    name = b"token_embd.weight"
    place = whole.index(name) + len(name) + 4 + 16  # after the number of dimensions and two of them
    for number, reason in (
        (gguf.GGMLQuantizationType.Q8_K, "is quantized as Q8_K, which"),
        (4000, "number 4000, which"),
    ):
        file.write_bytes(whole[:place] + int(number).to_bytes(4, "little") + whole[place + 4 :])
        with pytest.raises(ModelError, match=f"tensor token_embd.weight .*{reason}"):
            read_header(file)


def test_an_architecture_that_transformers_cannot_read_is_named(file: Path) -> None:
    with pytest.raises(ModelError, match=r"model.gguf: transformers cannot read this model of architecture rwkv7: .*"):
        ReadModel(written(file, "rwkv7"))


def test_a_file_that_lacks_metadata_is_named(file: Path) -> None:
    with pytest.raises(ModelError, match="transformers cannot read this model of architecture llama"):
        ReadModel(written(file))


def test_a_tensor_without_a_place_is_refused(file: Path, whole: bytes) -> None:
    """transformers' reader itself would drop it without a word."""
    save_gguf(file, attention_bias=True)
    file.write_bytes(file.read_bytes().replace(b".attn_q.bias", b".attn_z.bias"))
    with pytest.raises(ModelError, match=r"has no place for 8 of its tensors, such as blk.0.attn_z.bias"):
        ReadModel(read_header(file))


def test_a_missing_weight_is_named(file: Path) -> None:
    save_gguf(file, "qwen2")
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weights of its architecture, such as model.layers.1.mlp.up_proj"):
        ReadModel(read_header(file))


def test_without_the_package_the_command_that_installs_it_is_named(
    file: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(whole)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"gguf is not installed: pip install 'alignpro\[gguf\]'"):
        read_header(file)
