"""Files longer than any disk, links that lead nowhere and names that no terminal should get, where shards are made and read."""

import json
import os
import tarfile
import time

import pytest

from mimscale.cli import main
from mimscale.data import ShardError, ShardIndex
from mimscale.data.build import writer
from mimscale.data.build.existing_tars import index_tars
from mimscale.data.build.sources.annotated_json import AnnotatedJson
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.data.shards.verify import verify


def lengthen(path, size=1 << 43):
    """Eight terabytes that take no room."""
    os.truncate(path, size)


@pytest.fixture(autouse=True)
def at_once():
    before = time.process_time()
    yield
    assert time.process_time() - before < 5


def test_a_table_and_a_tar_of_terabytes_are_refused_by_their_size(own_photo_shards):
    tar = sorted(own_photo_shards.glob("*.tar"))[0]
    lengthen(tar)
    assert any(f"{tar.name}: has 8,796,093,022,208 bytes" in problem for problem in verify(own_photo_shards))
    lengthen(own_photo_shards / "samples.npy")
    with pytest.raises(ShardError, match=tar.name):
        ShardIndex.load(own_photo_shards)
    assert any(tar.name in problem for problem in verify(own_photo_shards))


def test_a_foreign_tar_of_terabytes_is_refused_by_what_follows_its_members(photographs, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(sorted(photographs.rglob("*.JPEG"))[0], "0.jpg")
    lengthen(tmp_path / "a.tar")
    with pytest.raises(ShardError, match=r"a\.tar: [0-9,]+ bytes after its last member"):
        index_tars(tmp_path)


def test_a_json_of_zeros_is_refused_at_the_first(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [')
    lengthen(tmp_path / "a.json", 2**30)
    with pytest.raises(ShardError, match="byte 12 is zero"):
        AnnotatedJson(tmp_path / "a.json")


@pytest.mark.parametrize("name", [0.0, [], "", None])
def test_a_file_name_that_is_no_text_is_named(tmp_path, name):
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [], "categories": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match="file_name that is a path"):
        AnnotatedJson(tmp_path / "a.json")


def test_a_link_to_itself_is_left_out(photographs, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.JPEG").symlink_to(sorted(photographs.rglob("*.JPEG"))[0])
    (tmp_path / "a" / "1.JPEG").symlink_to("1.JPEG")
    index = writer.build(ImageFolder(tmp_path), tmp_path / "out")
    assert (index.samples, index.rejected) == (1, 1)
    assert "1.JPEG\tcannot be followed" in (tmp_path / "out/rejected.tsv").read_text()


def test_what_no_terminal_should_get_is_escaped(own_photo_shards, tmp_path, capsys):
    odd = own_photo_shards.rename(tmp_path / "a\x1b[31m\u202eb")
    (odd / "index.json").write_text("{")
    assert main(["shards", "list", str(odd)]) == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\u202e" not in said
    assert "a\\x1b[31m\\u202eb/index.json is not valid JSON" in said


def test_a_journal_that_was_changed_has_its_shard_written_again(photographs, tmp_path, monkeypatch):
    made, out, options = writer.make_shard, tmp_path / "out", writer.Options(samples_per_shard=8)
    done = []

    def killed_after_the_first(task):
        if done:
            raise KeyboardInterrupt
        done.append(task)
        return made(task)

    monkeypatch.setattr(writer, "make_shard", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        writer.build(ImageFolder(photographs), out, options=options)
    monkeypatch.undo()
    (entry,) = (out / ".build/journal").glob("*.json")
    entry.write_text("[" * 100_000)
    (table,) = (out / ".build/journal").glob("*.npy")
    table.unlink()
    os.mkfifo(table)
    assert writer.build(ImageFolder(photographs), out, options=options).samples == 32
    assert verify(out) == []
