"""A build in parts that know nothing of each other ends with the bytes of a build in one piece, whatever happens to them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from mimscale.data import ShardError, ShardIndex
from mimscale.data.build import job_array, writer
from mimscale.data.build.job_array import Part, build_part
from mimscale.data.build.shard_writer import Options
from mimscale.data.build.sources.image_folder import ImageFolder

OPTIONS = Options(samples_per_shard=20)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def build(solar_folders, tmp_path):
    source, val = ImageFolder(solar_folders / "train"), ImageFolder(solar_folders / "val")

    def build(text: str, options: Options = OPTIONS, out: Path = tmp_path / "out"):
        return build_part(Part.parse(text), source, out, val=val, options=options)

    return build


def test_parts_side_by_side_write_what_one_build_writes(solar_folders, solar_shards, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "shards/build.py", "build", "--source", solar_folders / "train", "--val",
               solar_folders / "val", "--out", out, "--samples-per-shard", "20", "--workers", "1"]  # fmt: skip
    root = Path(__file__).parents[2]
    running = [subprocess.Popen([*command, "--part", f"{number}/3@7"], cwd=root, stderr=subprocess.DEVNULL)
               for number in (1, 2, 3)]  # fmt: skip
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert digests(out) == digests(solar_shards)


def test_a_part_that_failed_is_run_again_and_the_last_one_writes_the_index(build, solar_shards, tmp_path, monkeypatch):
    written = []
    plain = writer.write_shard

    def fails_late(task):
        if len(written) == 2:
            raise ShardError("the disk is full")
        written.append(task.file)
        plain(task)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", fails_late)
        with pytest.raises(ShardError, match="disk is full"):
            build("1/2@a")
    index, left = build("2/2@a")
    assert index is None
    assert left > 0
    with pytest.raises(ShardError, match="did not finish"):
        ShardIndex.load(tmp_path / "out")
    again = []
    monkeypatch.setattr(writer, "write_shard", lambda task: (again.append(task.file), plain(task)))
    # Another array, so that the source is listed anew; what is written stays.
    assert build("1/2@b")[0] is not None
    assert not set(again) & set(written)
    assert digests(tmp_path / "out") == digests(solar_shards)
    assert build("2/2@c")[0] is not None
    assert digests(tmp_path / "out") == digests(solar_shards)


def test_the_index_waits_for_a_part_that_still_runs(build, solar_shards, tmp_path, monkeypatch):
    """A part started twice is refused; one that reads its shards again is not left without its journal."""
    assert build("2/2@a")[0] is None
    plain, seen = job_array.pool.run, []

    def meanwhile(function, tasks, workers):
        yield from plain(function, tasks, workers)
        if not seen and function is writer.make_shard:
            seen.append("once")
            with pytest.raises(ShardError, match="another process writes this part"):
                build("1/2@a")
            assert build("2/2@a") == (None, 0)
            with pytest.raises(ShardError, match="another build is writing"):
                build("1/1@b")

    monkeypatch.setattr(job_array.pool, "run", meanwhile)
    assert build("1/2@a")[0] is not None
    assert seen
    assert digests(tmp_path / "out") == digests(solar_shards)


def test_parts_that_do_not_fit_together_are_refused(build):
    build("1/2@a")
    with pytest.raises(ShardError, match="another part of a was given other images or options"):
        build("2/2@a", Options(samples_per_shard=10))
    with pytest.raises(ShardError, match="other images or with other options"):
        build("2/2@b", Options(samples_per_shard=10))
    for text in ("3/2@a", "0/2@a", "1/2", "1/2@", "x/2@a"):
        with pytest.raises(ShardError, match="K/N@ID"):
            build(text)
