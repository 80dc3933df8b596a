"""A file is the old one or the new one, whatever happens while it is written."""

import pytest

from mimscale.files import write_beside, write_text


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
