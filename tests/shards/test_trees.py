"""The same tree of images is the same data set as a folder, as a tar and as a tar of class tars; what is left out has a line."""

import io
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimscale.cli import main
from mimscale.data import ShardIndex


@pytest.fixture(scope="module")
def pictures(photographs):
    return [path.read_bytes() for path in sorted(photographs.rglob("*.JPEG"))]


def lay(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def packed(path, files, before=""):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(before + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def built(source, out, *more):
    assert main(["shards", "build", "--source", str(source), "--out", str(out), "--workers", "1", *map(str, more)]) == 0
    index = ShardIndex.load(out)
    return {index.key(s): (index.classes[index.label(s)], index.read(s)) for s in index.samples("100")}


def lines(out):
    return (out / "rejected.tsv").read_text().splitlines() if (out / "rejected.tsv").exists() else []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(
        st.tuples(
            st.sampled_from(["cat", "dog", "owl"]), st.sampled_from(["", "a/", "b/c/"]), st.integers(0, 9),
            st.sampled_from([".jpg", ".JPEG", ".jfif", "", ".txt", ".json"]),
        ), min_size=4, max_size=14, unique=True,
    )
)  # fmt: skip
def test_a_tree_is_one_data_set_in_three_forms_and_nothing_is_left_out_without_a_line(
    pictures, names, tmp_path_factory
):
    root = tmp_path_factory.mktemp("tree")
    files = {"cat/first.jpg": pictures[-1], "dog/first.jpg": pictures[-2]}
    for number, (folder, below, stem, suffix) in enumerate(names):
        other = suffix in (".txt", ".json")
        files[f"{folder}/{below}x{stem}{suffix}"] = b"no picture" if other else pictures[number]
    forms = {"folder": lay(root / "tree", files), "tar": packed(root / "a.tar", files)}
    forms["dots"] = packed(root / "b.tar", files, "./")
    forms["wrapped"] = packed(root / "c.tar", files, "train/")
    classes = {name: {} for name in ("cat", "dog", "owl")}
    for name, data in files.items():
        folder, _, below = name.partition("/")
        classes[folder][below] = data
    held = {name: images for name, images in classes.items() if any(data != b"no picture" for data in images.values())}
    lost = sum(map(len, classes.values())) - sum(map(len, held.values()))  # of a folder without images no tar is made
    tars = {f"{name}.tar": packed(root / f"{name}.tar", images).read_bytes() for name, images in held.items()}
    forms["class tars"] = packed(root / "d.tar", tars)
    made = {form: built(source, root / f"out_{form}") for form, source in forms.items()}
    assert made["tar"] == made["dots"] == made["wrapped"] == made["class tars"] == made["folder"]
    for form in forms:
        found = len(files) - (lost if form == "class tars" else 0)
        assert len(made[form]) + len(lines(root / f"out_{form}")) == found


def test_splits_and_loose_images_are_refused_in_every_form(pictures, tmp_path, capsys):
    splits = {f"{split}/{name}/{n}.jpg": pictures[n] for split in ("train", "val") for n, name in enumerate("ab")}
    loose = {"a/0.jpg": pictures[0], "b/1.jpg": pictures[1], "2.jpg": pictures[2]}
    for what, files, said in (
        ("s", splits, "splits of a data set"),
        ("l", loose, "1 image (2.jpg) beside 2 class folders"),
    ):
        for source in (lay(tmp_path / what, files), packed(tmp_path / f"{what}.tar", files, "./")):
            assert (
                main(["shards", "build", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"])
                == 1
            )
            assert said in capsys.readouterr().err


def test_a_class_name_wins_over_a_number_and_labels_come_in_every_form(pictures, tmp_path, capsys):
    train = lay(tmp_path / "train", {f"{n}/{n}.jpg": pictures[n] for n in range(12)})
    flat = lay(tmp_path / "flat", {f"my photo {n}.jpg": pictures[n] for n in range(12)})
    for number, text in enumerate((
        "".join(f"my photo {n}.jpg {n}\r\n" for n in range(12)),
        "\ufeff" + "".join(f"my photo {n}\t{n}\n" for n in range(12)),
        "filename,label\n" + "".join(f"my photo {n}.jpg,{n}\n" for n in range(12)),
    )):  # fmt: skip
        (tmp_path / "labels").write_text(text, newline="")
        for form in (flat, packed(tmp_path / "v.tar", {path.name: path.read_bytes() for path in flat.iterdir()})):
            out = tmp_path / f"out{number}{form.name}"
            built(train, out, "--val", form, "--val-labels", tmp_path / "labels")
            index = ShardIndex.load(out)
            for sample in index.samples("val"):
                assert index.key(sample).endswith(f"photo {index.classes[index.label(sample)]}")
    (tmp_path / "labels").write_text("".join(f"my photo {n}.jpg {n + 1}\n" for n in range(12)))
    arguments = ["--val", flat, "--val-labels", tmp_path / "labels", "--out", tmp_path / "no"]
    assert main(["shards", "build", "--source", str(train), "--workers", "1", *map(str, arguments)]) == 1
    assert "could be a name or a number" in capsys.readouterr().err


def test_less_than_half_taken_is_an_error_unless_it_is_allowed(pictures, tmp_path, capsys):
    source = lay(tmp_path / "a", {"x/0.jpg": pictures[0], "y/1.jpg": b"none", "y/2.jpg": b"none"})
    arguments = ["shards", "build", "--source", str(source), "--workers", "1", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 1
    assert "only 1 of 3 images" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "two"), "--allow-loss"]) == 0
    assert (tmp_path / "one/rejected.tsv").read_bytes() == (tmp_path / "two/rejected.tsv").read_bytes()
