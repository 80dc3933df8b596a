"""What ``mimscale bench data`` measures; no figure of it is judged here but the quality."""

from __future__ import annotations

import json

from mimscale.cli import main


def test_reading_is_compared_at_equal_quality(photo_shards, tmp_path, capsys):
    assert (
        main(["bench", "data", str(photo_shards), "--rounds", "2", "--batch", "8", "--json", str(tmp_path / "f")]) == 0
    )
    figures = json.loads((tmp_path / "f").read_text())
    assert [name.partition(": ")[2] for name in figures["pipelines"]] == [
        "mimscale", "ImageFolder + PIL", "webdataset", "libjpeg-turbo decode alone",
    ]  # fmt: skip
    assert all(row["images_per_s"] > 0 and row["x_imagefolder"] > 0 for row in figures["pipelines"].values())
    mean, least = figures["psnr_db"][photo_shards.name]
    assert mean > 55 and least > 50
    assert "dB to Pillow's antialiased bilinear" in capsys.readouterr().out


def test_building_is_compared_out_of_a_folder_and_out_of_class_tars(photo_shards, tmp_path):
    assert main(["bench", "data", str(photo_shards), "--build", "--rounds", "1", "--json", str(tmp_path / "f")]) == 0
    figures = json.loads((tmp_path / "f").read_text())["build"]
    assert set(figures) == {f"{source}: {writer}" for source in ("folder", "class tars")
                            for writer in ("mimscale", "webdataset.ShardWriter")}  # fmt: skip
    assert all(row["images_per_core_s"] > 0 and row["images_per_s"] > 0 for row in figures.values())
