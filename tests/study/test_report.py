"""The report: the paper's figures and tables from a study's own runs, on one page, with every number's run."""

from __future__ import annotations

import csv
import dataclasses
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import study_results
from PIL import Image

from mimscale.commands import study
from mimscale.study.report.drawing import PALETTE
from mimscale.study.report.report import write_report
from mimscale.study.results.result import Result, ResultsError


class Reader(HTMLParser):
    """What a page holds: ids, links, headings in order, words, and what it would load from elsewhere."""

    def __init__(self, page: Path):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.levels: list[int] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        if tag in ("script", "img", "iframe", "object") or (tag == "link" and not values["href"].startswith("data:")):
            self.loads.append(tag)

    def handle_data(self, data):
        self.words += data


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def of_published(tmp_path_factory) -> Path:
    """The report of the 63 published runs alone, as the launcher makes it."""
    folder = tmp_path_factory.mktemp("published")
    assert study.main(["report", "published", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Path, list[Result]]:
    """The report of a study with seeds, fine-tunings, decoders, MAE, a class subset, and runs that are not done."""
    folder = tmp_path_factory.mktemp("own")
    runs = str(folder / "runs")
    results = list(study_results.grid(seeds=2, run=runs))
    for start in list(results):
        scores = {"top1": 100 - 80 * start.val_loss}
        tuned = dataclasses.replace(
            start,
            cell=f"{start.cell}-in1k",
            kind="finetune",
            task="in1k",
            scores=scores,
            start=start.cell,
            val_loss=None,
        )
        results.append(tuned)
    base = next(r for r in results if (r.model, r.dataset, r.iterations) == ("swinv2_b", "photos_20", 2000))
    results.append(
        dataclasses.replace(base, cell="heavy", decoder="8-blocks", val_loss=base.val_loss + 0.01, train_loss=0.1)
    )
    curve = ((100, 0.9, None), (200, 0.8, 0.85), (300, 0.7, 0.8))
    few = dataclasses.replace(base, cell="few", dataset="photos8", sampling="classes", images=2_010, curve=curve)
    results.append(few)
    results += [
        dataclasses.replace(r, cell=f"mae-{r.cell}", objective="mae", model=r.model.replace("swinv2", "vit"))
        for r in study_results.grid(run=runs)
        if r.model != "swinv2_h"
    ]
    index = next(i for i, r in enumerate(results) if r.model == "swinv2_h" and r.iterations == 4000 and r.seed == 1)
    results[index] = dataclasses.replace(results[index], status="failed", val_loss=None, note="no space left on device")
    return write_report(results, folder / "report", "A study", output=folder).parent, results


def test_published_runs_give_table_3s_imagenet_row(of_published):
    row = rows(of_published / "table3.csv")[0]
    assert row["Task"] == "ImageNet-1K top-1"
    assert abs(float(row["Overfitting, validation loss"]) - -0.79) < 0.08
    assert abs(float(row["Others, validation loss"]) - -0.90) < 0.08
    assert row["Split by"] == "shorter training or smaller model"
    by_length = rows(of_published / "table3.csv")[1]
    assert (by_length["Task"], by_length["Split by"]) == ("ImageNet-1K top-1", "shorter training")
    for group, printed in (("Overfitting", -0.79), ("Others", -0.90)):
        assert abs(float(by_length[f"{group}, validation loss"]) - printed) < 0.01
    assert float(row["Overfitting, validation loss, paper"]) == -0.79
    assert float(row["Others, validation loss, paper"]) == -0.90


def test_published_runs_give_the_slopes_with_model_size(of_published):
    slopes = [float(row["Slope"]) for row in rows(of_published / "laws.csv") if row["Law"].startswith("model size")]
    assert slopes == pytest.approx([-0.0154, -0.0168, -0.0180], abs=5e-5)


def test_the_report_in_the_docs_is_the_one_that_is_made(of_published):
    def numbers(path: Path) -> list[float | str]:
        entries = [entry for line in csv.reader(path.read_text().splitlines()) for entry in line]
        return [float(entry) if re.fullmatch(r"[-+]?\d+\.\d+", entry) else entry for entry in entries]

    docs = Path(__file__).parents[2] / "docs/published"
    assert {path.name for path in docs.iterdir()} == {path.name for path in of_published.iterdir()}
    for path in docs.glob("*.csv"):
        for there, here in zip(numbers(path), numbers(of_published / path.name), strict=True):
            assert there == pytest.approx(here, rel=1e-6) if isinstance(here, float) else there == here


def test_what_was_not_run_is_shown_as_missing(of_published):
    words = Reader(of_published / "report.html").words
    assert "COCO box AP: no run" in words
    assert "No heavier decoder was run" in words
    assert not (of_published / "figure3.png").exists()
    assert rows(of_published / "table5.csv")[1]["Validation loss"] == ""
    assert rows(of_published / "table5.csv")[1]["Validation loss, paper"] == "0.511"


def test_page_loads_nothing_and_stays_light(own, of_published):
    for folder in (own[0], of_published):
        page = Reader(folder / "report.html")
        assert page.loads == []
        assert not re.search(r"https?://(?!www\.w3\.org/)", (folder / "report.html").read_text())
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5e6


def test_nothing_of_a_picture_is_cut_off_at_its_edges(own, of_published):
    for folder in (own[0], of_published):
        for path in folder.glob("*.png"):
            pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
            edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert np.abs(edges - pixels[0, 0]).max() == 0, path


def test_every_link_leads_somewhere_and_ids_are_unique(own):
    page = Reader(own[0] / "report.html")
    assert len(page.ids) == len(set(page.ids))
    runs = {str(Path(result.run)) for result in own[1] if result.run}
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert not Path(link).is_absolute()  # so that report and runs can be moved together
            target = (own[0] / link).resolve()
            assert target.exists() or str(target) in runs
    assert all(low <= high + 1 for high, low in zip(page.levels, page.levels[1:], strict=False))


def test_a_report_written_elsewhere_links_only_to_its_own_files_and_names_run_folders_from_the_output(own, tmp_path):
    page = Reader(write_report(own[1], tmp_path, "Handed on", output=own[0].parent))
    assert [link for link in page.links if not link.startswith("#") and not (tmp_path / link).exists()] == []
    assert "Folders are those in the study's output" in page.words
    named = {row["Run"]: row["Folder"] for row in rows(tmp_path / "runs.csv")}
    assert named == {result.cell: str(Path(result.run).relative_to(own[0].parent)) for result in own[1]}
    assert "Folders are those in the study's output" not in Reader(own[0] / "report.html").words


def test_every_number_is_traced_to_its_run_folder(own):
    table = {row["Run"]: row for row in rows(own[0] / "runs.csv")}
    assert len(table) == len(own[1])
    for result in own[1]:
        assert (own[0] / table[result.cell]["Folder"]).resolve() == Path(result.run)
        if result.kind == "pretrain" and result.status == "done":
            assert float(table[result.cell]["Validation loss"]) == result.val_loss


def test_cells_are_means_over_seeds_and_a_failed_seed_counts_in_none(own):
    table = {(row["Cell"], row["Objective"], row["Decoder"]): row for row in rows(own[0] / "cells.csv")}
    both = table["SwinV2-B on photos (50%), 2,000", "simmim", "linear"]
    seeds = [
        r.val_loss
        for r in own[1]
        if (r.model, r.dataset, r.iterations, r.kind) == ("swinv2_b", "photos_50", 2000, "pretrain")
    ]
    assert float(both["Validation loss"]) == pytest.approx(sum(seeds) / 2)
    assert both["Seeds"] == "2"
    words = Reader(own[0] / "report.html").words
    assert "± 0.0004" in words and "no space left on device" in words
    alone = table["SwinV2-H on photos (10%), 4,000", "simmim", "linear"]
    assert alone["Seeds"] == "1" and alone["Validation loss"]


def test_figures_are_drawn_for_all_that_was_run(own):
    drawn = {path.stem for path in own[0].glob("*.png")}
    assert drawn == {"figure1", "figure2", "figure4", "figure5", "figure6", "figure7", "figure8"}
    for path in own[0].glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    page = (own[0] / "report.html").read_text()
    assert page.count('role="img"') == page.count("<title id=")


def not_started(run: str | None = None) -> list[Result]:
    return [
        dataclasses.replace(r, status="missing", val_loss=None, train_loss=None) for r in study_results.grid(run=run)
    ]


def test_a_report_of_nothing_says_so(tmp_path):
    page = Reader(write_report(not_started(), tmp_path, "Not started"))
    assert "0 of 48" in page.words and "These runs show it" not in page.words
    assert not list(tmp_path.glob("*.png"))


def test_contradictory_results_are_refused_and_the_old_report_stays(tmp_path):
    write_report(not_started(), tmp_path, "First")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    twice = [*not_started("a"), *not_started("b")]
    with pytest.raises(ResultsError, match=r"has two results, a/.* and b/"):
        write_report(twice, tmp_path, "Second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8729]])  # over D65's white


@pytest.mark.parametrize("vision", VISION)
def test_datasets_are_told_apart_with_any_colour_vision(vision):
    css = resources.files("mimscale.study").joinpath("data", "report.css").read_text()
    day, night = (re.findall(r"--d[0-5]: (#[0-9a-f]{6})", part) for part in css.split("@media", 1))
    assert tuple(day) == PALETTE[:6] and len(night) == 6
    for palette in (day, night):
        rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in palette])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = np.clip(linear @ VISION[vision].T, 0, 1) @ TO_XYZ.T
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(6, 1)]
        assert apart.min() > 20  # CIE76; 2.3 is just noticeable


def test_a_reports_own_words_cannot_break_the_page(tmp_path):
    evil = dataclasses.replace(not_started()[0], note='<script>alert("x")</script>', cell="a<b")
    page = write_report([evil], tmp_path, "<b>Title & more")
    assert "<script" not in page.read_text() and "<b>Title" not in page.read_text()


def test_without_the_papers_numbers_none_are_shown(tmp_path):
    write_report(not_started(), tmp_path, "Alone", published=False)
    assert "paper" not in (tmp_path / "table3.csv").read_text() + (tmp_path / "table4.csv").read_text()
