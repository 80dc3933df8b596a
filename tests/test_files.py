"""A file is the old one or the new one, whatever happens while it is written."""

import os
import resource
from pathlib import Path

import pytest

from mimscale.files import UnfitFile, append_text, remove_partial, write_beside, write_text


@pytest.mark.parametrize("durable", [False, True])
def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, durable):
    path = tmp_path / "made on the way" / "notes.txt"
    write_text(path, "old, été", durable)
    with write_beside(path, durable) as beside:
        beside.write_text("half")
        assert path.read_text("utf-8") == "old, été"
        beside.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays_as_it_was_with_nothing_beside_it(tmp_path):
    path, elsewhere = tmp_path / "notes.txt", tmp_path / "work"
    elsewhere.mkdir()
    write_text(path, "old")
    for folder in (None, elsewhere):
        with pytest.raises(OSError, match="disk full"), write_beside(path, folder=folder) as beside:
            beside.write_text("half")
            raise OSError("disk full")
    assert path.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == [path, elsewhere]


def test_nothing_is_written_through_a_link_in_the_place_of_a_file(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    link = tmp_path / "run" / "notes.txt"
    link.parent.mkdir()
    link.symlink_to(outside)
    with pytest.raises(UnfitFile, match=r"notes\.txt is a link, and what it leads to is not written to; remove it"):
        append_text(link, "more\n")
    write_text(link, "new")
    assert not link.is_symlink() and link.read_text() == "new"
    assert outside.read_text() == "precious"


def test_a_linked_folder_is_written_to(tmp_path):
    (tmp_path / "other disk").mkdir()
    (tmp_path / "run").symlink_to("other disk")
    write_text(tmp_path / "run" / "notes.txt", "new")
    append_text(tmp_path / "run" / "log", "line\n")
    assert sorted(path.name for path in (tmp_path / "other disk").iterdir()) == ["log", "notes.txt"]


def test_what_is_written_to_has_a_name_that_cannot_be_foreseen(tmp_path):
    path, names = tmp_path / ("n" * 255), set()
    for _ in range(3):
        with write_beside(path) as beside:
            assert beside.read_bytes() == b""  # made anew, so that it is no link to something
            names.add(beside.name)
    assert len(names) == 3
    assert all(name.startswith(".nnn") and len(name) <= 255 for name in names)
    (tmp_path / min(names)).write_text("left by a kill")
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_added_to(tmp_path, kind):
    path = tmp_path / "log"
    {"pipe": os.mkfifo, "folder": os.mkdir}[kind](path)
    with pytest.raises(UnfitFile, match=f"{path} is not a regular file; remove it"):
        append_text(path, "line\n")


def test_where_there_is_no_room_the_file_is_named_and_stays_as_it_was(tmp_path):
    path = tmp_path / "log"
    append_text(path, 9 * "x" + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, before[1]))
    try:
        with pytest.raises(OSError) as added:
            append_text(path, 9 * "y" + "\n")
        with pytest.raises(OSError) as written:
            write_text(path, 99 * "z")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert added.value.filename == written.value.filename == str(path)
    assert path.read_text() == 9 * "x" + "\n"
    assert list(tmp_path.iterdir()) == [path]


def test_no_device_is_replaced():
    with pytest.raises(UnfitFile, match="/dev/stdout is no place for a file"):
        write_text(Path("/dev/stdout"), "new")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "notes", "new")
    assert error.value.filename == str(tmp_path / "notes")


def test_what_is_durable_is_on_the_disk_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut after a rename could else leave an empty file, or the old one, where the new one was announced."""
    synced: list[tuple[int, str]] = []
    path = tmp_path / "notes.txt"
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, path.read_text() if path.exists() else ""))

    monkeypatch.setattr(os, "fsync", noted)
    write_text(path, "old")
    assert synced == []
    write_text(path, "new", durable=True)
    assert synced == [(path.stat().st_ino, "old"), (tmp_path.stat().st_ino, "new")]
