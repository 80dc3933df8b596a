"""Thousands of random damages: each is an error or a skipped sample, never a crash, a hang or a stray file."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from mimscale.data import MIMStream, ShardError, ShardIndex
from mimscale.data.build import writer
from mimscale.data.build.existing_tars import index_tars
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.data.build.sources.imagenet_archives import ClassTars
from mimscale.data.shards.tar import pack_header
from mimscale.data.shards.verify import verify

DAMAGES, SOURCE_DAMAGES = 2000, 400


@pytest.fixture(scope="module")
def small_source(photographs, tmp_path_factory) -> Path:
    """Three classes of ten JPEGs of 48 x 40 pixels, and one PNG."""
    folder = tmp_path_factory.mktemp("small")
    pixels = simplejpeg.decode_jpeg(sorted(photographs.glob("*/*"))[0].read_bytes())
    for number in range(30):
        crop = np.ascontiguousarray(pixels[5 * number : 5 * number + 40, 7 * number : 7 * number + 48])
        path = folder / f"class_{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(crop, 85))
    from PIL import Image

    Image.fromarray(pixels[:40, :48]).save(folder / "class_1" / "drawing.png")
    return folder


@pytest.fixture(scope="module")
def small_shards(small_source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small_shards") / "out"
    writer.build(ImageFolder(small_source), out, options=writer.Options(samples_per_shard=5))
    return out


def bomb() -> bytes:
    """A JPEG of a few hundred bytes that asks for 65,500 x 65,500 pixels."""
    data = bytearray(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def places(index: ShardIndex, shard: int, draw: random.Random) -> dict[str, int]:
    """A byte of a header, of image data, of padding and of the end of a tar."""
    sample = draw.choice(np.flatnonzero(index.shard_numbers(np.arange(len(index))) == shard).tolist())
    offset, size = index.offset(sample), len(index.read(sample))
    return {
        "header": offset - 512 + draw.randrange(512),
        "data": offset + draw.randrange(size),
        "padding": offset + size + draw.randrange(max(1, -size % 512)),
        "end": index.shards[shard].bytes - 1 - draw.randrange(1024),
    }


def damage(folder: Path, index: ShardIndex, draw: random.Random) -> str:
    """Do one random harm to a shard folder; returns the name of the file that was harmed."""
    shard = draw.randrange(len(index.shards))
    name = index.shards[shard].file
    path = folder / name
    kind = draw.choice(
        [
            "cut",
            "cut",
            "flip",
            "flip",
            "flip",
            "block",
            "empty",
            "missing",
            "other",
            "bomb",
            "hostile",
            "index",
            "table",
        ]
    )
    where = places(index, shard, draw)[draw.choice(["header", "data", "padding", "end"])]
    content = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[:where])
    elif kind == "flip":
        for _ in range(draw.choice([1, 1, 3, 50])):
            content[where] ^= 1 << draw.randrange(8)
            where = draw.choice([where, draw.randrange(len(content))])
        if bytes(content) == path.read_bytes():
            content[where] ^= 1
        path.write_bytes(content)
    elif kind == "block":
        content[where : where + 512] = draw.randbytes(len(content[where : where + 512]))
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "other":
        path.write_bytes((folder / index.shards[shard - 1].file).read_bytes())
    elif kind == "bomb":
        sample = draw.choice(np.flatnonzero(index.shard_numbers(np.arange(len(index))) == shard).tolist())
        offset, fake = index.offset(sample), bomb()
        content[offset : offset + len(fake)] = fake
        path.write_bytes(content[: index.shards[shard].bytes])
    elif kind == "hostile":
        sample = draw.choice(np.flatnonzero(index.shard_numbers(np.arange(len(index))) == shard).tolist())
        offset = index.offset(sample)
        hostile = draw.choice([b"../../escape.jpg", b"/etc/escape.jpg", b"\xff\xfe.jpg", b""])
        content[offset - 512 : offset] = pack_header(hostile, draw.choice([len(index.read(sample)), 8**11 - 1, 0]))
        path.write_bytes(content)
    else:
        name = "index.json" if kind == "index" else "samples.npy"
        path = folder / name
        content = bytearray(path.read_bytes())
        where = draw.randrange(len(content))
        if draw.random() < 0.3:
            content = content[:where]
        else:
            content[where] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return name


def read_epoch(folder: Path) -> tuple[int, set[str]]:
    """Read a folder without the checks of opening, as a run does whose shards are damaged after it began."""
    index = ShardIndex.load_unchecked(folder)
    stream = MIMStream(index, "100", image_size=32, global_batch=31, stop_step=1, max_damaged=31, masked=0)
    batch = next(iter(stream))
    return len(batch.keys), {key for key, _ in batch.skipped}


@pytest.mark.timeout(300)
def test_two_thousand_damages_are_each_named_and_none_does_harm(small_shards, tmp_path):
    draw = random.Random(0)
    pristine = {path.name: path.read_bytes() for path in small_shards.iterdir()}
    index = ShardIndex.load(small_shards)
    folder = tmp_path / "area" / "shards"
    folder.mkdir(parents=True)
    outcomes: dict[str, int] = {"skipped": 0, "stopped": 0, "harmless": 0}
    # A hang would end here and not at the test's own limit.
    signal.alarm(280)
    for name, content in pristine.items():
        (folder / name).write_bytes(content)
    for number in range(DAMAGES):
        harmed = damage(folder, index, draw)
        try:
            problems = verify(folder)
        except ShardError as error:
            problems = [str(error)]
        assert problems and any(harmed in problem for problem in problems), (number, harmed, problems)
        try:
            ShardIndex.load(folder)
            count, skipped = read_epoch(folder)
            assert count == 31
            outcomes["skipped" if skipped else "harmless"] += 1
        except ShardError as error:
            outcomes["stopped"] += 1
            assert str(folder) in str(error) or "damaged samples" in str(error)
        assert {path.name for path in folder.iterdir()} <= set(pristine)
        (folder / harmed).write_bytes(pristine[harmed])
    signal.alarm(0)
    assert [path.name for path in (tmp_path / "area").iterdir()] == ["shards"] and len(list(tmp_path.iterdir())) == 1
    # All three happen, or the damages were not what they are meant to be.
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.timeout(200)
def test_damaged_sources_stop_a_build_or_leave_out_what_is_damaged(small_source, tmp_path):
    source = tmp_path / "class_tars"
    source.mkdir()
    for folder in sorted(small_source.iterdir()):
        with tarfile.open(source / f"{folder.name}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
            archive.add(sorted(folder.iterdir())[0], "ünïcödé" * 20 + ".jpg")
    pristine = {path.name: path.read_bytes() for path in source.iterdir()}
    draw = random.Random(1)
    built = refused = 0
    signal.alarm(180)
    for _ in range(SOURCE_DAMAGES):
        name = draw.choice(sorted(pristine))
        content = bytearray(pristine[name])
        kind = draw.choice(["flip", "cut", "block"])
        where = draw.randrange(len(content))
        if kind == "flip":
            content[where] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[where:]
        else:
            content[where : where + 512] = draw.randbytes(len(content[where : where + 512]))
        (source / name).write_bytes(content)
        out = tmp_path / "out"
        try:
            writer.build(ClassTars(source), out)
            assert not verify(out)
            built += 1
        except ShardError as error:
            refused += 1
            assert str(source) in str(error)
            assert not list(out.glob("*.tar"))
        try:
            index_tars(source)
        except ShardError as error:
            assert str(source) in str(error)
        for extra in ("index.json", "samples.npy"):
            (source / extra).unlink(missing_ok=True)
        shutil.rmtree(out)
        (source / name).write_bytes(pristine[name])
    signal.alarm(0)
    assert {path.name for path in tmp_path.iterdir()} == {"class_tars"}
    assert built > 50 and refused > 50


def test_damage_done_while_reading_is_skipped(small_shards, tmp_path):
    folder = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    index = ShardIndex.load(folder)
    stream = MIMStream(index, "100", image_size=32, global_batch=31, masked=0)
    assert not stream.batch(0).skipped
    for shard in index.shards[:3]:
        os.truncate(folder / shard.file, 700)
    assert {reason.split()[-3:][0] for _, reason in stream.batch(0).skipped} <= {"ends", "before", "it"}
    assert len(stream.batch(0).skipped) >= sum(shard.samples for shard in index.shards[:3]) - 3


def test_verify_names_the_sample_whose_label_or_image_changed(small_shards, tmp_path):
    folder = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    index = ShardIndex.load(folder)
    sample = 7
    path, offset, size = index.shard_of(sample), index.offset(sample), len(index.read(sample))
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 255
    path.write_bytes(content)
    assert verify(folder)[1:] == [f"{path}: {index.key(sample)}: image bytes have changed"]
    content[offset + size // 2] ^= 255
    label = offset + size + -size % 512 + 512
    content[label : label + 1] = b"9"
    path.write_bytes(content)
    assert verify(folder)[1:] == [f"{path}: {index.key(sample)}: its label has changed"]
