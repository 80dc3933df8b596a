"""ImageNet's archives in, shards out: the structure and the class sizes are ImageNet's, the images are small."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset
from conftest import ROOT

from mimscale.data import SampleOrder, ShardError, ShardIndex

CLASSES = 1000


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "shards" / "build.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.uid, entry.uname = len(data), 1_300_000_000, 1000, "somebody"
    archive.addfile(entry, io.BytesIO(data))


def small_images(count: int, photographs: Path) -> list[bytes]:
    """Different JPEGs of 16 x 16 pixels, cut out of a photograph."""
    pixels = simplejpeg.decode_jpeg(next(iter(sorted(photographs.glob("*/*")))).read_bytes())
    height, width = pixels.shape[0] - 16, pixels.shape[1] - 16
    places = [(7 * n // width % height, 7 * n % width) for n in range(count)]
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[y : y + 16, x : x + 16]), 90) for y, x in places]


def class_sizes() -> np.ndarray:
    """ImageNet-1K's class sizes, 732 to 1,300, a hundredth of each."""
    return np.concatenate([np.full(895, 13), np.linspace(7, 12, 105).astype(int)])


@pytest.fixture(scope="module")
def train_archive(photographs, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A tar of 1,000 class tars, and its images by key."""
    sizes = class_sizes()
    images = iter(small_images(int(sizes.sum()), photographs))
    path, content = tmp_path_factory.mktemp("imagenet") / "ILSVRC2012_img_train.tar", {}
    with tarfile.open(path, "w") as outer:
        for number, size in enumerate(sizes):
            synset, buffer = f"n{1440764 + 997 * number:08}", io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for image in range(size):
                    data = next(images)
                    member(inner, f"{synset}_{image * 7}.JPEG", data)
                    content[f"{synset}/{synset}_{image * 7}"] = data
            member(outer, f"{synset}.tar", buffer.getvalue())
    return path, content


@pytest.fixture(scope="module")
def val_archive(photographs, train_archive) -> tuple[Path, list[str]]:
    """A flat tar of held-out images beside ``train_archive``, and the synset of each."""
    path = train_archive[0].with_name("ILSVRC2012_img_val.tar")
    synsets = sorted({key.split("/")[0] for key in train_archive[1]})
    of_image = [synsets[number * 37 % CLASSES] for number in range(200)]
    with tarfile.open(path, "w") as archive:
        for number, data in enumerate(small_images(200, photographs), 1):
            member(archive, f"ILSVRC2012_val_{number:08}.JPEG", data)
    return path, of_image


@pytest.fixture(scope="module")
def built(train_archive, val_archive, tmp_path_factory) -> Path:
    """Shards of both archives."""
    folder = tmp_path_factory.mktemp("imagenet_shards")
    (folder / "labels.txt").write_text("\n".join(val_archive[1]))
    result = run("build", "--source", train_archive[0], "--val", val_archive[0], "--val-labels", folder / "labels.txt",
                 "--out", folder / "out", "--samples-per-shard", 500, "--subset", "in100=100", "--workers", 2)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "out"


def test_a_tar_of_class_tars_becomes_shards_byte_for_byte(train_archive, built):
    index = ShardIndex.load(built)
    assert run("verify", built).stdout.startswith(f"{built}: {len(index):,} samples")
    samples = index.samples("100")
    assert {index.key(s): index.read(s) for s in samples} == train_archive[1]
    assert all(index.key(s).startswith(index.classes[index.label(s)]) for s in samples)
    assert len(index.classes) == CLASSES == len(np.unique(index.labels(samples)))


def test_fractions_have_their_share_of_every_class_and_stock_readers_read_them(train_archive, built):
    index = ShardIndex.load(built)
    total = int(class_sizes().sum())
    seen: set[str] = set()
    for fraction in (10, 20, 50, 100):
        keys = set(index.keys(index.samples(str(fraction))))
        assert len(keys) == round(total * fraction / 100) and seen <= keys
        shards = [str(path) for path in index.shard_files(str(fraction))]
        assert {s["__key__"] for s in webdataset.WebDataset(shards, shardshuffle=False)} == keys
        counts = np.bincount(index.labels(index.samples(str(fraction))), minlength=CLASSES)
        assert np.abs(counts - class_sizes() * fraction / 100).max() <= 1
        seen = keys
    assert len(np.unique(index.labels(index.samples("in100")))) == 100
    names = set()
    for shard in index.shards:
        listed = subprocess.run(["tar", "-tf", built / shard.file], capture_output=True, text=True, check=True)
        names |= set(listed.stdout.split())
    assert len(names) == 2 * len(index)


def test_held_out_images_get_the_labels_of_their_file_in_every_form(val_archive, train_archive, built, tmp_path):
    index = ShardIndex.load(built)
    held_out = index.samples("val")
    expected = {f"ILSVRC2012_val_{n:08}": synset for n, synset in enumerate(val_archive[1], 1)}
    labelled = {index.key(s).split("/")[1]: index.classes[index.label(s)] for s in held_out}
    assert labelled == expected

    from mimscale.data.build.sources.labels import read_labels

    names = [f"{name}.JPEG" for name in sorted(expected)]
    pairs = tmp_path / "val.txt"
    pairs.write_text("".join(f"{name} {index.classes.index(expected[name[:-5]])}\n" for name in names))
    assert read_labels(pairs, names)[0] == {name: str(index.classes.index(expected[name[:-5]])) for name in names}
    scipy_io = pytest.importorskip("scipy.io")
    # The devkit's numbers are not in the order of the synsets.
    numbers = {synset: 1 + number * 13 % CLASSES for number, synset in enumerate(index.classes)}
    rows = np.array(
        [(n, s, "words") for s, n in numbers.items()], [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    )
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": rows.reshape(-1, 1)})
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{numbers[expected[name[:-5]]]}\n" for name in names))
    assert read_labels(truth, names)[0] == {name: expected[name[:-5]] for name in names}
    (tmp_path / "meta.mat").unlink()
    with pytest.raises(ShardError, match=r"put the devkit's meta\.mat beside it"):
        read_labels(truth, names)
    truth.write_text("n01440764\n")
    with pytest.raises(ShardError, match="1 label for 200 images"):
        read_labels(truth, names)


def test_a_folder_of_class_tars_with_undecodable_files_and_hostile_names(photographs, tmp_path):
    images = small_images(40, photographs)
    source = tmp_path / "tars"
    source.mkdir()
    for number in range(4):
        with tarfile.open(source / f"n{number:08}.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            for image in range(9):
                member(archive, f"n{number:08}_{image}.JPEG", images[9 * number + image])
            member(archive, f"n{number:08}_{'long' * 40}.JPEG", images[36 + number])
            member(archive, "../../escape.JPEG", images[0])
            member(archive, "/etc/passwd.JPEG", images[1])
            member(archive, f"n{number:08}_broken.JPEG", images[0][:-40])
            link = tarfile.TarInfo("link.JPEG")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    result = run("build", "--source", source, "--out", tmp_path / "out", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "4 files could not be decoded" in result.stdout
    index = ShardIndex.load(tmp_path / "out")
    assert len(index.samples("100")) == 4 * 12
    (tmp_path / "unpacked").mkdir()
    for shard in index.shards:
        with tarfile.open(tmp_path / "out" / shard.file) as archive:
            assert not any(".." in name or name.startswith("/") for name in archive.getnames())
        subprocess.run(["tar", "-xf", tmp_path / "out" / shard.file, "-C", tmp_path / "unpacked"], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"tars", "out", "unpacked"}


@pytest.mark.parametrize("keep", [300, 700, 70_000, 2_000_300])
def test_an_archive_cut_anywhere_is_an_error_that_says_where(train_archive, tmp_path, keep):
    cut = tmp_path / "ILSVRC2012_img_train.tar"
    cut.write_bytes(train_archive[0].read_bytes()[:keep])
    result = run("build", "--source", cut, "--out", tmp_path / "out", "--workers", 1)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(cut) in result.stderr and "byte" in result.stderr and "fetch it again" in result.stderr
    assert not list((tmp_path / "out").glob("*.tar"))


def test_tars_made_elsewhere_are_read_where_they_lie(photographs, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    images = small_images(60, photographs)
    with webdataset.ShardWriter(str(folder / "imagenet-train-%02d.tar"), maxcount=20, verbose=0) as writer:
        for number in range(50):
            writer.write({"__key__": f"sample{number:06}", "jpg": images[number], "cls": number % 5, "json": {"a": 1}})
    with webdataset.ShardWriter(str(folder / "imagenet-validation-%02d.tar"), maxcount=20, verbose=0) as writer:
        for number in range(50, 60):
            writer.write({"__key__": f"sample{number:06}", "jpg": images[number], "cls": number % 5})
    assert run("index", folder).returncode == 0
    index = ShardIndex.load(folder)
    assert {index.key(s): (index.read(s), index.label(s)) for s in index.samples("100")} == {
        f"sample{n:06}": (images[n], n % 5) for n in range(50)
    }
    assert [len(index.samples(f)) for f in ("10", "20", "50", "val")] == [5, 10, 25, 10]
    assert set(index.samples("10")) <= set(index.samples("20")) <= set(index.samples("50"))
    assert np.bincount(index.labels(index.samples("10"))).tolist() == [1] * 5
    assert run("verify", folder).returncode == 0
    again = run("index", folder)
    assert again.returncode == 1 and "is there already" in again.stderr


def test_a_fraction_kept_small_or_decoded_has_the_same_batches(photo_shards, tmp_path):
    import io as bytes_io

    from PIL import Image

    from mimscale.data.stream.crops import decode_sample

    original = ShardIndex.load(photo_shards)
    for name, more in (
        ("small", ["--resize-shorter", 128]),
        ("pixels", ["--store", "pixels", "--resize-shorter", 128]),
    ):
        out = tmp_path / name
        result = run("build", "--source", photo_shards, "--fraction", "50", "--out", out, "--workers", 1, *more)
        assert result.returncode == 0, result.stderr
        index = ShardIndex.load(out)
        assert [f for f in index.fractions if f.isdigit()] == ["10", "20", "50"]
        for fraction in ("10", "20", "50"):
            assert SampleOrder(index, fraction, 3).batch(2, 7) == SampleOrder(original, fraction, 3).batch(2, 7)
        for sample in index.samples("50").tolist():
            stored = decode_sample(index, sample)
            assert min(stored.shape[:2]) == 128
            # Another decoder agrees on the shape of what was stored.
            with Image.open(bytes_io.BytesIO(index.read(sample))) as image:
                assert (image.height, image.width, 3) == stored.shape
            reference = Image.fromarray(decode_sample(original, sample)).resize(
                stored.shape[1::-1], Image.Resampling.BICUBIC
            )
            error = np.square(np.asarray(reference, float) - stored).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > (33 if name == "small" else 60)
        assert run("verify", out).returncode == 0
