"""Files of weights made to harm: each ends in an error that says what is wrong, in no time and no memory."""

import io
import json
import os
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch

import mimscale
from mimscale.mim import SimMIM
from mimscale.models import CheckpointMismatch, create_encoder, load_released
from mimscale.models.weights.export import export_weights
from mimscale.models.weights.released import read_checkpoint


def tiny():
    return create_encoder(
        "swinv2_s", img_size=64, window_size=2, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )


@pytest.fixture(autouse=True)
def little_memory():
    """No more address space than there is now and 1 GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def long(number):
    return b"\x8a\x08" + number.to_bytes(8, "little")


# Twice the same tuple of twice the same tuple ..., 60 deep.
LAUGHS = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + long(2**40) + b"tQ"
PICKLES = {
    "a call of the system": (b"cos\nsystem\nX\x02\0\0\0id\x85R.", "calls os.system"),
    "memory by bytearray": (b"cbuiltins\nbytearray\n" + long(2**40) + b"\x85R.", "calls builtins.bytearray"),
    "memory by a storage": (b"ctorch\nFloatStorage\n" + long(2**40) + b"\x85R.", "calls torch.FloatStorage"),
    "a storage that is not there": (STORAGE + b".", "4,398,046,511,104 bytes, and the file lacks its record"),
    "a key that takes ages": (b"}" + LAUGHS + b"K\x01s.", "tuple as the key"),
    "instructions without end": (b"]" + b"Na" * 500_000 + b".", "more than 250,000 instructions"),
    "text longer than the file": (b"X\xff\xff\xff\x7fabc.", "only 4 remain"),
    "a stack that is empty": (b"sssss.", "damaged"),
}


def torch_zip(path, pickle, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickle)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
    return path


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_looked_through_before_it_is_run(tmp_path, name):
    pickle, said = PICKLES[name]
    with pytest.raises(ValueError, match=said):
        read_checkpoint(torch_zip(tmp_path / "w.pth", pickle))


def test_a_compressed_record_is_no_weights(tmp_path):
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(torch_zip(tmp_path / "w.pth", b"]" + bytes(10**6), zipfile.ZIP_DEFLATED))


def test_the_old_format_is_believed_no_size_that_it_does_not_hold(tmp_path):
    file = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(3)}}, file, _use_new_zipfile_serialization=False)
    whole = file.getvalue()
    (tmp_path / "w.pth").write_bytes(whole)
    assert list(read_checkpoint(tmp_path / "w.pth")) == ["w"]
    size = whole.index(b"K\x03", whole.index(b"cpu"))
    (tmp_path / "w.pth").write_bytes(whole[:size] + long(2**40) + whole[size + 2 :])
    with pytest.raises(ValueError, match="its tensors need 4,398,046,511,104 bytes"):
        read_checkpoint(tmp_path / "w.pth")


def test_numbers_that_repeat_make_no_large_model_of_a_small_file(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="tells of 4,000,000,000,000 bytes"):
        read_checkpoint(tmp_path / "w.pth")


def header(change):
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {"w": {**tensor, **change}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (header({"shape": [3]}), "w takes 8 bytes, which are not F32"),
        (header({"data_offsets": [0, 2**40], "shape": [2**38]}), "its tensors take 1,099,511,627,776 bytes"),
        (header({"data_offsets": [-8, 0]}), "no sizes"),
        (header({"shape": [True, 2]}), "no sizes"),
        (header({"shape": [0, 2**61, 2**61]}), "too many or too large"),
        (header({"dtype": "F1024"}), "the type F1024"),
        ({"a\x1b[31m": 1}, r"the header's entry of a\\x1b\[31m"),
        ({**header({}), "v": header({})["w"]}, "overlap"),
        ('{"w": 1, "w": 2}', "duplicate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"__metadata__": {"a": [1]}}', "no strings by name"),
        ("[]", "no JSON object"),
    ],
)
def test_a_safetensors_header_fits_its_file(tmp_path, text, said):
    text = (text if isinstance(text, str) else json.dumps(text)).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=said):
        read_checkpoint(tmp_path / "w.safetensors")


def test_a_header_may_not_be_longer_than_its_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="its header would have"):
        read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embed_dim": 10**6}, "does not fit"),
        ({"depths": [10**6] * 4}, "of 84 tensors"),
        ({"num_classes": 10**6}, None),
        ({"embed_dim": 10**30}, "no number up to"),
        ({"drop_path": float("nan")}, "no number up to"),
        ({"window_size": {"a": 1}}, "no number up to"),
        ({"patch_size": 0}, "make no encoder"),
        ({"img_size": "wide"}, "make no encoder"),
        ({"name": "a\x1b[31m"}, r"'a\\x1b\[31m', which is not registered"),
    ],
)
def test_settings_in_a_file_must_be_those_of_its_weights(tmp_path, change, said):
    encoder = tiny()
    path = tmp_path / "w.safetensors"
    export_weights(SimMIM(encoder), "safetensors", path)
    stored = path.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    content = json.loads(stored[8 : 8 + length])
    content["__metadata__"]["mimscale.encoder"] = json.dumps({**encoder.made_from, **change})
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + length :])
    if said is None:
        assert mimscale.load(path).num_classes == 0
        return
    with pytest.raises(ValueError, match=said):
        mimscale.load(path)


def test_weights_that_are_no_numbers_are_named_and_nothing_is_loaded(tmp_path):
    model = SimMIM(tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({**before, "encoder.norm.weight": before["encoder.norm.weight"] / 0}, tmp_path / "w.pth")
    with pytest.raises(CheckpointMismatch, match=r"NaN or infinity in 1 tensor \(encoder.norm.weight\)"):
        load_released(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_what_does_not_fit_forty_lines_are_said(tmp_path):
    torch.save({f"{i}\x1b[31m": torch.zeros(1) for i in range(100)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointMismatch) as caught:
        load_released(SimMIM(tiny()), tmp_path / "w.pth")
    lines = str(caught.value).splitlines()
    assert sum(line.startswith("  missing") for line in lines) == 40
    assert "  and 146 more" in lines
    assert "\x1b" not in str(caught.value)
