"""Images, the folders and archives that they come in, and shards of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import scipy.io
from PIL import Image

from fuzzing.case import Case, Misfit, Reader, kind, material
from fuzzing.mutations import (
    bytes_mutated,
    clutter,
    file_mutated,
    json_mutated,
    json_text,
    lines_mutated,
    replace_file,
    tree_mutated,
)
from mimscale.data import MIMStream, SampleOrder, ShardError, ShardIndex, ValidationStream, decode
from mimscale.data.build import writer
from mimscale.data.build.existing_tars import index_tars
from mimscale.data.build.source import open_source
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.data.build.sources.labels import read_labels
from mimscale.data.errors import DamagedSample
from mimscale.data.shards.format import Index, table_dtype
from mimscale.data.shards.verify import verify

FORMATS = {
    "jpg": ("RGB", {"quality": 80}),
    "progressive.jpg": ("RGB", {"progressive": True, "format": "JPEG"}),
    "grey.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "png": ("RGB", {}),
    "alpha.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "deep.png": ("I;16", {}),
    "two.png": ("1", {}),
    "gif": ("P", {"save_all": True}),
    "webp": ("RGB", {}),
    "bmp": ("RGB", {}),
    "tiff": ("RGB", {}),
    "ppm": ("RGB", {}),
}


@functools.cache
def _photograph() -> Image.Image:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return image.convert("RGB")


def photograph(number: int, width: int = 56, height: int = 48) -> Image.Image:
    """A piece of a photograph."""
    left, top = 17 * number % 400, 23 * number % 500
    return _photograph().crop((left, top, left + width, top + height))


@material("images")
def make_images(folder: Path) -> None:
    """One image in each format."""
    folder.mkdir()
    for number, (name, (mode, options)) in enumerate(FORMATS.items()):
        image = photograph(number)
        image = (
            Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        )
        image.save(folder / f"image.{name}", **options)


@material("folder")
def make_folder(folder: Path) -> None:
    """A folder of class folders."""
    for number in range(9):
        path = folder / f"class_{number // 3}" / f"image_{number}.{'png' if number == 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path)


@material("shards", "folder")
def make_shards(folder: Path) -> None:
    """Shards of it, four images in a tar, some held out."""
    source = ImageFolder(folder.parent / "folder")
    writer.build(source, folder, val=source, options=writer.Options(samples_per_shard=4))


@material("archives", "folder", "images")
def make_archives(folder: Path) -> None:
    """A tar of class tars, a folder of them, a flat tar with labels, WebDataset tars, and the devkit."""
    folder.mkdir()
    classes = sorted((folder.parent / "folder").iterdir())
    (folder / "tars").mkdir()
    for path in classes:
        with tarfile.open(folder / "tars" / f"{path.name}.tar", "w") as archive:
            for image in sorted(path.iterdir()):
                archive.add(image, image.name)
    with tarfile.open(folder / "train.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted((folder / "tars").iterdir()):
            archive.add(path, path.name)
    images = [image for path in classes for image in sorted(path.iterdir())]
    with tarfile.open(folder / "val.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for image in images:
            archive.add(image, ("ü" if image is images[0] else "") + image.name)
    names = sorted(("ü" if image is images[0] else "") + image.name for image in images)
    (folder / "labels.txt").write_text("".join(f"{name} {classes[i % 3].name}\n" for i, name in enumerate(names)))
    (folder / "numbers.txt").write_text("".join(f"{i % 3 + 1}\n" for i in range(len(names))))
    (folder / "synsets.txt").write_text("".join(f"{classes[i % 3].name}\n" for i in range(len(names))))
    (folder / "elsewhere").mkdir()
    for number, split in enumerate(("train", "train", "val")):
        with tarfile.open(folder / "elsewhere" / f"{split}-{number:03}.tar", "w") as archive:
            for place, image in enumerate(images[3 * number : 3 * number + 3]):
                for ending, content in ((image.suffix, image.read_bytes()), (".cls", b"%d" % number), (".json", b"{}")):
                    member = tarfile.TarInfo(f"{number}/{place:04}{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    rows = np.zeros((3, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for number, path in enumerate(classes):
        rows[number, 0] = (np.array([[number + 1]]), np.array([path.name]), np.array(["word"]))
    scipy.io.savemat(folder / "meta.mat", {"synsets": rows}, do_compression=False)
    content = {
        "images": [{"id": i, "file_name": f"{image.parent.name}/{image.name}"} for i, image in enumerate(images)],
        "annotations": [{"id": i, "image_id": i, "category_id": 10 + i // 3} for i in range(len(images))],
        "categories": [{"id": 10 + i, "name": path.name} for i, path in enumerate(classes)],
    }
    (folder / "annotated.json").write_text(json.dumps(content))


# -- images ------------------------------------------------------------------------------------------------------------


@kind("image", DamagedSample, needs=("images",))
def image(case: Case) -> Reader:
    """An image file, looked at as a build does and decoded as training does."""
    name = case.rng.choice(list(FORMATS))
    path = case.copy(f"images/image.{name}")
    if case.rng.random() < 0.1:
        path = path.rename(path.with_name(case.rng.choice(("a.eps", "a.ps", "a.svg", "a.pdf", "a.jpg", "a"))))
        path.write_bytes(case.rng.choice(_OTHERS))
    file_mutated(path, bytes_mutated, case, strange=0.03)

    def read() -> None:
        if path.is_file() and path.stat().st_size < 2**24:
            data = path.read_bytes()
            decode.identify(
                lambda start, length: data[start : start + length], len(data), thorough=case.rng.random() < 0.5
            )
        decode.read_rgb(path)

    return read


_OTHERS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(touch) print\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    b"P6 65500 65500 255\n",
    b"P6\n100000 100000\n255\n",
    b"RIFF\xff\xff\xff\x7fWEBPVP8L" + b"\0" * 40,
    b"II*\0\x08\0\0\0" + b"\xff" * 64,
    b"GIF89a\xff\xff\xff\xff\xf7\0\0" + b"\0" * 800 + b",\0\0\0\0\xff\xff\xff\xff\0\x08",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x27\x10\0\0\x27\x0f\x08\x02\0\0\0" + b"\0" * 30,
    b"BM" + b"\0" * 16 + b"\xff\xff\xff\x7f" * 9,
    b"gimp xcf ",
    b"8BPS\0\x01" + b"\0" * 30,
    b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 60,
    b"\0\0\0\x1cftypavif\0\0\0\0" + b"\0" * 60,
    b"qoif\xff\xff\xff\xff\xff\xff\xff\xff\x03\0",
)


# -- shards ------------------------------------------------------------------------------------------------------------


def _use(root: Path) -> None:
    """Read a shard folder in every way that training and the commands do."""
    index = ShardIndex.load(root)
    index.summary()
    for fraction in index.fractions:
        samples = index.samples(fraction)
        index.keys(samples), index.labels(samples), index.shard_files(fraction)
        for sample in samples.tolist():
            try:
                data = index.read(sample)
                index.intact(sample, data)
                decode.decode_rgb(data)
            except DamagedSample:
                continue
    if len(index) < 1000 and len(index.samples(index.largest_fraction)):
        SampleOrder(index, fraction=index.largest_fraction, seed=0).batch(0, 4)
        next(
            iter(
                MIMStream(
                    index,
                    fraction=index.largest_fraction,
                    seed=0,
                    image_size=32,
                    global_batch=2,
                    rank=0,
                    world_size=1,
                    start_step=0,
                    workers=0,
                )
            ),
            None,
        )
    if "val" in index.fractions:
        next(iter(ValidationStream(index, 32, 2)), None)


def _sealed(content: dict) -> bytes:
    """An index's content with a digest that holds."""
    content.pop("sha256", None)
    text = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")
    content["sha256"] = hashlib.sha256(text).hexdigest()
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


def _renewed(data: bytes, rng: random.Random) -> bytes:
    changed = tree_mutated(json.loads(data), rng)
    try:
        return _sealed(changed) if isinstance(changed, dict) else json_text(changed, rng)
    except (UnicodeEncodeError, TypeError):
        return json_text(changed, rng)


@kind("index", ShardError, needs=("shards",))
def index(case: Case) -> Reader:
    """An index as it is changed by accident: its own digest tells."""
    root = case.copy("shards")
    file_mutated(root / "index.json", json_mutated, case)
    return lambda: _use(root)


@kind("index-renewed", ShardError, needs=("shards",))
def index_renewed(case: Case) -> Reader:
    """An index as somebody changes it who renews its digest."""
    root = case.copy("shards")
    file_mutated(root / "index.json", _renewed, case, strange=0)
    if case.rng.random() < 0.2:
        clutter(root, case)
    return lambda: _use(root)


@kind("samples-renewed", ShardError, needs=("shards",))
def samples(case: Case) -> Reader:
    """The table of samples, with its digest in the index renewed."""
    root = case.copy("shards")
    path, rng = root / "samples.npy", case.rng
    if rng.random() < 0.5:
        table = np.load(path)
        for _ in range(rng.randint(1, 3)):
            column = rng.choice(table.dtype.names)
            rows = rng.choice((slice(None), rng.randrange(len(table))))
            values = (0, 1, -1, 255, 511, 512, 513, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, -(2**62))
            with np.errstate(all="ignore"):
                if column == "key":
                    table[column][rows] = rng.choice(
                        (b"", b"\xff\xfe", b"a\nb", b"../../x", b"\x1b[31m", b"class_0/image_0", b"/abs")
                    )
                else:
                    table[column][rows] = np.array(rng.choice(values), np.int64).astype(table.dtype[column])
        table = rng.choice(
            (table, table, table, table[::-1], table[:3], np.concatenate([table, table]), table.astype(table_dtype(40)))
        )
        np.save(path, table)
    else:
        file_mutated(path, bytes_mutated, case, strange=0.1)
    content = json.loads((root / "index.json").read_bytes())
    if path.is_file() and path.stat().st_size < 2**26:
        content["table_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if rng.random() < 0.3:
        content["key_bytes"] = rng.choice((0, 1, 40, 1024))
    if rng.random() < 0.3:
        content["samples"] = rng.choice((0, 3, 18, 36))
    (root / "index.json").write_bytes(_sealed(content))
    return lambda: _use(root)


@kind("shard-renewed", ShardError, needs=("shards",))
def shard(case: Case) -> Reader:
    """A tar of a shard folder, with its size and digest in the index renewed."""
    root, rng = case.copy("shards"), case.rng
    path = rng.choice(sorted(root.glob("*.tar")))
    file_mutated(path, bytes_mutated, case, strange=0.08)
    if rng.random() < 0.8 and path.is_file() and path.stat().st_size < 2**26:
        content = Index.read(root / "index.json")
        for one in content.shards:
            if one.file == path.name:
                one.bytes, one.sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        (root / "index.json").write_bytes(content.to_json())

    def read() -> None:
        for problem in verify(root):
            print(problem)
        _use(root)

    return read


# -- sources -----------------------------------------------------------------------------------------------------------


def _build(case: Case, source: Path, labels: Path | None = None) -> None:
    """List a source, and now and then build shards of it and read them."""
    opened = open_source(source, labels, held_out=labels is not None)
    names = {name: label for label, name in enumerate(opened.classes)}
    for task in opened.tasks(names, thorough=case.rng.random() < 0.5):
        task.run()
    if labels is None and case.rng.random() < 0.5:
        writer.build(opened, case.out / "shards", options=writer.Options(samples_per_shard=4))
        _use(case.out / "shards")


@kind("image-folder", ShardError, needs=("folder",))
def folder(case: Case) -> Reader:
    """A folder with strange entries: links, pipes, loops, names."""
    root, rng = case.copy("folder"), case.rng
    for _ in range(rng.randint(1, 3)):
        files = [path for path in root.rglob("*") if path.is_file()]
        below = rng.choice([root, *(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())])
        way = rng.random()
        if way < 0.3 and files:
            replace_file(rng.choice(files), case)
        elif way < 0.7:
            clutter(below, case)
        elif way < 0.8:
            (below / f"loop{rng.randrange(99)}").symlink_to(rng.choice(("..", ".", "/", case.victim, "../..")))
        elif files:
            file_mutated(rng.choice(files), bytes_mutated, case)
    if any(path.is_symlink() and os.path.realpath(path) == "/" for path in root.rglob("*")):
        # All of this machine's files would be listed: a link out of the source is followed, as users want.
        for path in root.rglob("*"):
            if path.is_symlink() and os.path.realpath(path) == "/":
                path.unlink()
    return lambda: _build(case, root)


def tar_mutated(data: bytes, rng: random.Random) -> bytes:
    """A tar with other fields in a header, whose checksum is made to hold, or other bytes."""
    if rng.random() < 0.3:
        return bytes_mutated(data, rng)
    changed = bytearray(data)
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.randint(1, 2)):
        at = rng.choice(headers or [0])
        block = bytearray(changed[at : at + 512])
        start, end = rng.choice(
            (
                (0, 100),
                (100, 108),
                (124, 136),
                (124, 136),
                (136, 148),
                (156, 157),
                (156, 157),
                (157, 257),
                (257, 265),
                (345, 500),
            )
        )
        new = rng.choice(
            (
                b"7" * 11 + b"\0",
                b"\x80" + b"\0" * 3 + b"\xff" * 8,
                b"\x80" + b"\0" * 10 + b"\x05",
                b"-0000000001\0",
                b"\xff" * 12,
                b"0" * 11 + b"\0",
                b"00000000000\0",
                b"\0" * 12,
                b"x",
                b"g",
                b"L",
                b"K",
                b"S",
                b"1",
                b"2",
                b"5",
                b"6",
                b"../../victim/file.txt\0",
                b"/etc/passwd\0",
                b"a\nb\x1b[31m.jpg\0",
                b"\xff\xfe.jpg\0",
                b"n" * 100,
                b".jpg\0",
                b"\0",
                b"00000001000\0",
                b"77777777777\0",
                rng.randbytes(12),
            )
        )
        block[start:end] = (
            new[: end - start].ljust(end - start, b"\0") if rng.random() < 0.9 else rng.randbytes(end - start)
        )
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        changed[at : at + 512] = block
    if rng.random() < 0.25:
        records = rng.choice(
            (
                b"30 size=-1\n",
                b"20 size=99999999999\n",
                b"11 path=a\n",
                b"0 path=a\n",
                b"-5 path=a\n",
                b"99999999 path=a\n",
                b"x" * 512,
                b"12 size=nan\n",
                b"".join(b"%d k%d=v\n" % (len(str(i)) + 7, i) for i in range(20_000)),
                b"1000020 path=" + b"n" * 1_000_000 + b"\n",
                b"18 size=1e999999\n",
            )
        )
        head = tarfile.TarInfo("./PaxHeaders/x")
        head.size, head.type = len(records), rng.choice((b"x", b"g", b"L", b"K", b"S"))
        whole = head.tobuf(tarfile.USTAR_FORMAT) + records + b"\0" * (-len(records) % 512)
        at = rng.choice([0, *headers])
        changed[at:at] = whole * rng.choice((1, 1, 1, 50 if len(whole) < 5000 else 1))
    return bytes(changed)


@kind("source-tar", ShardError, needs=("archives",))
def source_tar(case: Case) -> Reader:
    """A tar of class tars, a folder of them, or a flat one."""
    root, rng = case.copy("archives"), case.rng
    way = rng.choice(("train.tar", "tars", "val.tar"))
    path = root / way
    changed = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
    file_mutated(changed, tar_mutated, case, strange=0.05)
    return lambda: _build(case, path)


@kind("webdataset", ShardError, OSError, needs=("archives",))
def webdataset(case: Case) -> Reader:
    """Tars made elsewhere, indexed where they lie."""
    root, rng = case.copy("archives/elsewhere"), case.rng
    file_mutated(rng.choice(sorted(root.iterdir())), tar_mutated, case, strange=0.1)
    if rng.random() < 0.1:
        clutter(root, case)
    case.outputs.append(root)

    def read() -> None:
        index_tars(root)
        _use(root)

    return read


@kind("annotated-json", ShardError, needs=("archives", "folder"))
def annotated(case: Case) -> Reader:
    """A json of images, annotations and categories."""
    root = case.copy("folder")
    path = case.copy("archives/annotated.json", "folder/annotated.json")
    file_mutated(path, json_mutated, case)
    assert root.exists()
    return lambda: _build(case, path)


@kind("labels", ShardError, needs=("archives",))
def labels(case: Case) -> Reader:
    """Labels of held-out images."""
    root, rng = case.copy("archives"), case.rng
    path = root / rng.choice(("labels.txt", "labels.txt", "synsets.txt", "numbers.txt"))
    if path.name == "numbers.txt":
        (root / "meta.mat").unlink()  # another kind's
    file_mutated(path, lines_mutated, case)
    with tarfile.open(root / "val.tar") as archive:
        names = sorted(archive.getnames())
    if rng.random() < 0.3:
        return lambda: _build(case, root / "val.tar", path)
    return lambda: read_labels(path, names)


@kind("meta.mat", ShardError, needs=("archives",), share=0.05, starts=True)
def devkit(case: Case) -> Reader:
    """The devkit's table, which a process of its own reads."""
    root = case.copy("archives")
    file_mutated(root / "meta.mat", bytes_mutated, case, strange=0.1)
    return lambda: read_labels(root / "numbers.txt", [f"{number}.jpg" for number in range(9)])


# -- builds ------------------------------------------------------------------------------------------------------------


@material("interrupted", "folder")
def make_interrupted(folder: Path) -> None:
    """A build that was ended after its first shard."""
    made, done = writer.make_shard, []

    def once(task: Any) -> int:
        if done:
            raise KeyboardInterrupt
        done.append(task)
        return made(task)

    writer.make_shard = once
    with contextlib.suppress(KeyboardInterrupt):
        writer.build(ImageFolder(folder.parent / "folder"), folder, options=writer.Options(samples_per_shard=4))
    assert list(folder.glob(".build/journal/*")), "nothing is left of the build"


@kind("interrupted-build", ShardError, OSError, needs=("interrupted",))
def interrupted(case: Case) -> Reader:
    """A build that is resumed: what stands must be what it would write, or be written again."""
    out, rng = case.copy("interrupted"), case.rng
    case.outputs.append(out)
    files = [*(out / ".build" / "journal").iterdir(), *out.glob("*.tar"), out / ".build" / "plan"]
    for path in rng.sample(sorted(files), rng.choice((1, 1, 2))):
        how = json_mutated if path.suffix == ".json" else bytes_mutated
        file_mutated(path, how, case, strange=0.2)
    if rng.random() < 0.2:
        clutter(rng.choice((out, out / ".build", out / ".build" / "journal")), case)

    def read() -> None:
        writer.build(ImageFolder(case.material / "folder"), out, options=writer.Options(samples_per_shard=4))
        if problems := verify(out):
            raise Misfit(f"the build is damaged: {problems[:3]}")

    return read
