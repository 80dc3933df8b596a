"""What building shards from image folders promises."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimscale.commands import shards as command
from mimscale.data import ShardError, ShardIndex
from mimscale.data.build import job_array, writer
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.data.shards import fractions


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "shards" / "build.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_source_image_is_stored_once_byte_for_byte_with_its_label(solar_folders, solar_shards):
    stored = {}
    for tar in sorted(solar_shards.glob("train-*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                assert member.mtime == member.uid == member.gid == 0
                assert member.name not in stored
                stored[member.name] = archive.extractfile(member).read()
    classes = sorted(folder.name for folder in (solar_folders / "train").iterdir())
    for label, name in enumerate(classes):
        for source in (solar_folders / "train" / name).iterdir():
            assert stored.pop(f"{name}/{source.stem}.png") == source.read_bytes()
            assert stored.pop(f"{name}/{source.stem}.cls") == str(label).encode()
    assert not stored


def test_a_stock_webdataset_reader_reads_a_fraction_by_its_shard_list(solar_shards):
    index = ShardIndex.load(solar_shards)
    shards = [str(path) for path in index.shard_files("20")]
    read = {
        sample["__key__"]: (sample["png"], sample["cls"])
        for sample in webdataset.WebDataset(shards, shardshuffle=False)
    }
    samples = index.samples("20")
    assert read == {index.key(s): (index.read(s), b"%d" % index.label(s)) for s in samples}


def test_gnu_tar_lists_and_extracts_every_shard(photo_shards, photographs, tmp_path):
    for tar in photo_shards.glob("*.tar"):
        subprocess.run(["tar", "-xf", tar, "-C", tmp_path], check=True, capture_output=True)
    for source in photographs.glob("*/*.JPEG"):
        assert (tmp_path / source.parent.name / f"{source.stem}.jpg").read_bytes() == source.read_bytes()


def test_fractions_are_nested_whole_shards_with_a_fair_share_of_every_class(solar_folders, solar_shards):
    index = ShardIndex.load(solar_shards)
    everything = index.samples("100")
    sizes = np.bincount(index.labels(everything))
    smaller: set[int] = set()
    for fraction in (10, 20, 50, 100):
        samples = index.samples(str(fraction))
        assert len(samples) == round(fraction / 100 * len(everything))
        assert smaller <= set(samples.tolist())
        counts = np.bincount(index.labels(samples), minlength=len(sizes))
        assert np.abs(counts - fraction / 100 * sizes).max() <= 1
        assert sum(index.shards[n].samples for n in range(len(index.shards)) if index.root / index.shards[n].file in
                   index.shard_files(str(fraction))) == len(samples)  # fmt: skip
        smaller = set(samples.tolist())
    held_out = sum(1 for _ in (solar_folders / "val").glob("*/*.png"))
    assert len(index.samples("val")) == held_out
    assert not set(index.samples("val").tolist()) & set(everything.tolist())


def test_imagenets_class_sizes_give_the_counts_of_table_2():
    # 895 classes of 1,300 and 105 between 732 and 1,299, 1,281,167 in all.
    rest = np.linspace(732, 1299, 105).astype(int)
    while rest.sum() != 117_667:
        rest[np.argmin(np.abs(rest - 1120))] += np.sign(117_667 - rest.sum())
        rest = np.clip(rest, 732, 1299)
        room = np.flatnonzero((rest > 732) & (rest < 1299))
        step = np.sign(117_667 - rest.sum())
        rest[room[: abs(117_667 - rest.sum())]] += step
    sizes = np.concatenate([np.full(895, 1300), rest])
    counts = fractions.class_counts(sizes)
    assert counts.sum(axis=1).tolist() == [128_117, 256_233, 640_584, 1_281_167]
    assert np.all(np.diff(counts, axis=0) >= 0)
    assert np.abs(counts - np.outer([0.1, 0.2, 0.5, 1], sizes)).max() <= 1
    in100 = sizes[fractions.pick_classes(100, 1000, seed=0)].sum()
    assert 1.26e5 < in100 < 1.30e5


def test_the_same_source_and_seed_give_the_same_bytes_with_any_number_of_workers(photographs, photo_shards, tmp_path):
    source, options = ImageFolder(photographs), writer.Options(samples_per_shard=5)
    writer.build(source, tmp_path / "two", options=options, workers=2)
    assert digests(tmp_path / "two") == digests(photo_shards)
    writer.build(source, tmp_path / "other", options=writer.Options(samples_per_shard=5, seed=1))
    assert digests(tmp_path / "other") != digests(photo_shards)


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(solar_folders, solar_shards, tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, ROOT / "shards/build.py", "build", "--source", solar_folders / "train", "--val",
                 solar_folders / "val", "--out", out, "--samples-per-shard", "20", "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ShardError, match="did not finish"):
        ShardIndex.load(out)
    # A shard damaged since is not taken for finished either.
    first = sorted(out.glob("*.tar"))[0]
    first.write_bytes(first.read_bytes()[:-700])
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert digests(out) == digests(solar_shards)


def _build_until_killed(photographs, out, renames):
    """A build whose machine fails just before it would give the ``renames``-th file its name."""
    replace, left = Path.replace, iter(range(renames - 1))

    def replace_or_die(path, target):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = replace_or_die
    writer.build(ImageFolder(photographs), out, options=writer.Options(samples_per_shard=5))


def test_a_build_that_dies_again_and_again_ends_with_the_same_bytes(photographs, photo_shards, tmp_path):
    context, draw, deaths = multiprocessing.get_context("fork"), random.Random(0), 0
    while deaths < 60:
        # Two names are given before the first shard, and four for each shard that is new.
        process = context.Process(target=_build_until_killed, args=(photographs, tmp_path / "out", draw.randint(1, 7)))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        with pytest.raises(ShardError, match="did not finish"):
            ShardIndex.load(tmp_path / "out")
    assert 10 < deaths < 60
    assert digests(tmp_path / "out") == digests(photo_shards)
    assert not (tmp_path / "out" / ".build").exists()


def test_a_killed_worker_costs_nothing(solar_folders, solar_shards, tmp_path, monkeypatch):
    original, witness = writer.write_shard, tmp_path / "killed"

    def dies_once(task):
        if task.file == "train-050-000001.tar" and not witness.exists():
            witness.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(task)

    monkeypatch.setattr(writer, "write_shard", dies_once)
    source, val = ImageFolder(solar_folders / "train"), ImageFolder(solar_folders / "val")
    writer.build(source, tmp_path / "out", val=val, options=writer.Options(samples_per_shard=20), workers=2)
    assert witness.exists()
    assert digests(tmp_path / "out") == digests(solar_shards)


def test_odd_files_are_kept_as_what_they_are_or_counted_and_named(photographs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(photographs, source)
    one = source / "class_0"
    whole = (one / "photo_00.JPEG").read_bytes()
    image = Image.open(io.BytesIO(whole))
    image.save(one / "a_png_named.JPEG", "PNG")
    image.convert("CMYK").save(one / "cmyk.jpg")
    image.convert("L").save(one / "grey.jpg")
    image.save(one / "bitmap.bmp")
    (one / "stray_tail.jpg").write_bytes(whole + b"\0\0\0")
    (one / "photo.00.JPEG").write_bytes(whole)
    (one / "Ünï cödé.jpg").write_bytes(whole)
    (one / ("long" * 50 + ".jpg")).write_bytes(whole)
    (one / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (one / "empty.jpg").write_bytes(b"")
    (one / "text.jpg").write_text("no image")
    bomb = bytearray(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    (one / "bomb.jpg").write_bytes(bomb)
    (one / "notes.txt").write_text("not named like an image")
    (source / ".hidden").mkdir()

    result = run("build", "--source", source, "--out", tmp_path / "out", "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "4 files could not be decoded" in result.stdout
    rejected = (tmp_path / "out" / "rejected.tsv").read_text()
    assert all(name in rejected for name in ("cut.jpg", "empty.jpg", "text.jpg", "bomb.jpg"))
    index = ShardIndex.load(tmp_path / "out")
    assert (index.content.rejected, index.content.rewritten) == (4, 1)
    of_key = {index.key(s): index.read(s) for s in index.samples("100")}
    assert len(of_key) == 32 + 8
    assert of_key["class_0/a_png_named"] == (one / "a_png_named.JPEG").read_bytes()
    assert of_key["class_0/cmyk"] == (one / "cmyk.jpg").read_bytes()
    assert np.array_equal(np.array(Image.open(io.BytesIO(of_key["class_0/bitmap"]))), np.array(image))
    assert {"class_0/photo_00", "class_0/photo_00-2"} <= set(of_key)
    assert max(len(key.encode()) for key in of_key) < 110
    assert run("verify", tmp_path / "out").returncode == 0
    for tar in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(tar) as archive:
            assert archive.getmembers()


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12), percent=st.integers(1, 50), seed=st.integers(0, 9))
def test_a_share_is_held_out_of_every_class_and_never_all_of_one(sizes, percent, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    held = fractions.hold_out(labels, percent, seed)
    assert np.array_equal(held, fractions.hold_out(labels, percent, seed))
    for label, size in enumerate(sizes):
        count = int(held[labels == label].sum())
        assert count in (percent * size // 100, -(-percent * size // 100)) and (count < size or not size)


def test_a_held_out_share_is_in_no_training_fraction(photographs, tmp_path):
    for out, workers in (("one", 1), ("two", 2)):
        made = run(
            "build", "--source", photographs, "--out", tmp_path / out, "--val-share", "25%", "--workers", workers
        )
        assert made.returncode == 0, made.stderr
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    index = ShardIndex.load(tmp_path / "one")
    held, trained = (set(index.keys(index.samples(name))) for name in ("val", "100"))
    assert len(held) == 8 and len(trained) == 24 and not held & trained
    assert Counter(key.split("/")[0] for key in held) == {f"class_{number}": 2 for number in range(4)}
    assert all(set(index.keys(index.samples(name))) <= trained for name in ("10", "20", "50"))
    refused = run("build", "--source", tmp_path / "one", "--out", tmp_path / "again", "--val-share", "25%")
    assert refused.returncode == 1 and "holds images out already" in refused.stderr
    few = run("build", "--source", photographs / "class_0", "--out", tmp_path / "few", "--val-share", "1%")
    assert few.returncode == 1 and "less than one image" in few.stderr and not list((tmp_path / "few").glob("*"))


def test_views_name_classes_or_another_draw(solar_folders, solar_shards, tmp_path):
    out = Path(shutil.copytree(solar_shards, tmp_path / "out"))
    result = run("build", "--source", solar_folders / "train", "--val", solar_folders / "val", "--out", out,
                 "--samples-per-shard", 20, "--subset", "few=3", "--subset", "again=10%@7")  # fmt: skip
    assert result.returncode == 0, result.stderr
    index = ShardIndex.load(out)
    assert len(np.unique(index.labels(index.samples("few")))) == 3
    assert len(index.samples("again")) == len(index.samples("10"))
    assert set(index.samples("again")) != set(index.samples("10"))
    tars = {path.name: path.read_bytes() for path in solar_shards.glob("*.tar")}
    assert tars == {path.name: path.read_bytes() for path in out.glob("*.tar")}
    rows = {line.split()[0]: line.split()[1:] for line in run("list", out).stdout.splitlines()}
    assert rows["few"][1] == "3" and set(rows) >= {"10", "20", "50", "100", "val"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "{tmp}/nowhere"], "nowhere: no such file or folder"),
        (["--source", "{tmp}/empty"], "no images in it"),
        (["--source", "{photos}", "--out", "{other}"], "holds a build of other images or with other options"),
        (["--source", "{photos}", "--val", "{solar}"], "classes not in the training images: mono_000"),
        (["--source", "{photos}", "--subset", "in100=100"], "100 classes cannot be drawn from 4"),
        (["--source", "{photos}", "--subset", "50=2"], "NAME is not a number"),
    ],
)
def test_a_mistake_gets_one_clear_message(arguments, said, photographs, solar_folders, solar_shards, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "photos": photographs, "solar": solar_folders / "val", "other": solar_shards}
    filled = [argument.format(**places) for argument in arguments]
    out = [] if "--out" in filled else ["--out", str(tmp_path / "out")]
    before = digests(solar_shards)
    result = run("build", *filled, *out, "--workers", 1)
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr
    assert digests(solar_shards) == before


def test_a_refused_build_leaves_the_folder_as_it_was(photographs, solar_folders, photo_shards, tmp_path):
    def contents(folder: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}

    other, part = ImageFolder(solar_folders / "val"), job_array.Part.parse("1/2@a")
    finished, broken, strange, half = (tmp_path / name for name in ("finished", "broken", "strange", "half"))
    shutil.copytree(photo_shards, finished)
    shutil.copytree(photo_shards, broken)
    (broken / "index.json").write_bytes((photo_shards / "index.json").read_bytes()[:-20])
    strange.mkdir()
    for name in ("holiday.tar", "holiday.tar.partial-2"):
        (strange / name).write_bytes(b"of somebody else")
    for out, said in (
        (finished, "other images"), (broken, "not valid JSON.*build again into another folder"), (strange, "no build of mimscale")
    ):  # fmt: skip
        before = contents(out)
        with pytest.raises(ShardError, match=said):
            writer.build(other, out)
        with pytest.raises(ShardError, match=said):
            job_array.build_part(part, other, out)
        assert contents(out) == before
    # What the build that is to resume here has written stays.
    options = writer.Options(samples_per_shard=5)
    assert job_array.build_part(part, ImageFolder(photographs), half, options=options)[0] is None
    kept = {path: content for path, content in contents(half).items() if "listing" not in path.parts}
    with pytest.raises(ShardError, match="other images"):
        writer.build(other, half)
    assert contents(half).items() >= kept.items()
    writer.build(ImageFolder(photographs), half, options=options)
    assert digests(half) == digests(photo_shards)


@pytest.mark.root
def test_a_full_disk_is_said_and_the_same_command_finishes_later(photographs, photo_shards, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        arguments = ["build", "--source", photographs, "--out", disk / "out", "--samples-per-shard", 5, "--workers", 1]
        result = run(*arguments)
        assert result.returncode == 1
        assert "No space left on device" in result.stderr and "Traceback" not in result.stderr
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert run(*arguments).returncode == 0
        assert digests(disk / "out") == digests(photo_shards)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_progress_counts_images_and_says_what_is_left(capsys):
    progress = command.Progress()
    progress("writing images", 0, 100)
    progress("writing images", 100, 100)
    assert "writing images: 100/100" in capsys.readouterr().err
