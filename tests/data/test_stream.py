"""What the order of samples and the batches made of them promise."""

from __future__ import annotations

import ast
import hashlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from mimscale.data import CropSpec, MIMStream, SampleOrder, ShardError, ShardIndex, ValidationStream, draws
from mimscale.data.build import writer
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.data.shards.format import Index
from mimscale.data.shards.verify import verify
from mimscale.data.stream import augment


@pytest.fixture(scope="module")
def solar(solar_shards) -> ShardIndex:
    return ShardIndex.load(solar_shards)


@pytest.fixture(scope="module")
def photos(photo_shards) -> ShardIndex:
    return ShardIndex.load(photo_shards)


def same(a, b) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.mask, b.mask)
        and a.keys == b.keys
        and torch.equal(a.positions, b.positions)
        and torch.equal(a.draw_keys, b.draw_keys)
        and a.step == b.step
    )


def test_every_sample_comes_once_an_epoch_and_batches_straddle_epochs(solar):
    order = SampleOrder(solar, "20", seed=3)
    count = len(order)
    seen = [key for step in range(count) for key in order.batch(step, 7)]
    for epoch in range(7):
        assert Counter(seen[epoch * count : (epoch + 1) * count]) == Counter(solar.keys(order.samples))
    epochs = [seen[epoch * count : (epoch + 1) * count] for epoch in range(7)]
    assert all(a != b for a, b in pairwise(epochs))
    # A batch of more than an epoch is no special case.
    assert order.batch(0, 3 * count) == seen[: 3 * count]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**63), fraction=st.sampled_from(["10", "50", "100"]), ranks=st.sampled_from([1, 2, 4, 8]),
       step=st.integers(0, 10**6))  # fmt: skip
def test_global_batches_do_not_depend_on_the_batch_size_they_are_cut_into(solar, seed, fraction, ranks, step):
    order = SampleOrder(solar, fraction, seed)
    small = 16 // ranks
    assert order.batch(step, 16) == [key for part in range(ranks) for key in order.batch(step * ranks + part, small)]
    assert pickle.loads(pickle.dumps(order)).batch(step, 16) == order.batch(step, 16)


def test_ranks_together_see_what_one_rank_sees_and_a_restart_sees_what_was_next(solar):
    alone = list(MIMStream(solar, "50", seed=1, global_batch=12, stop_step=3))
    parts = [list(MIMStream(solar, "50", seed=1, global_batch=12, rank=r, world_size=3, stop_step=3)) for r in range(3)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([part[step].images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part[step].mask for part in parts]), whole.mask)
        assert [key for part in parts for key in part[step].keys] == whole.keys
        assert torch.equal(torch.cat([part[step].draw_keys for part in parts]), whole.draw_keys)
    resumed = list(MIMStream(solar, "50", seed=1, global_batch=12, start_step=2, stop_step=3))
    assert same(resumed[0], alone[2])
    other_batch = next(iter(MIMStream(solar, "50", seed=1, global_batch=18, start_step=1)))
    assert torch.equal(other_batch.images[:6], alone[1].images[6:]) and torch.equal(
        other_batch.positions, torch.arange(18, 36)
    )


def test_worker_processes_change_nothing_and_end_with_the_iterator(solar):
    here = list(MIMStream(solar, "10", global_batch=8, start_step=5, stop_step=12))
    there = list(MIMStream(solar, "10", global_batch=8, start_step=5, stop_step=12, workers=2))
    assert len(here) == len(there) == 7 and all(map(same, here, there))
    endless = iter(MIMStream(solar, "10", global_batch=8, workers=2))
    next(endless)
    children = torch.multiprocessing.active_children()
    assert children
    endless.close()
    assert not any(child.is_alive() for child in children)


def test_a_killed_worker_is_an_error_that_says_so(solar):
    endless = iter(MIMStream(solar, "10", global_batch=8, workers=2))
    next(endless)
    os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(ShardError, match="worker process was killed"):
        for _ in range(100):
            next(endless)


def test_a_worker_whose_sockets_close_before_it_has_ended_is_a_killed_worker(solar, monkeypatch):
    endless = iter(MIMStream(solar, "10", global_batch=8, workers=2))
    next(endless)
    killing = threading.Timer(0.3, os.kill, (torch.multiprocessing.active_children()[0].pid, signal.SIGKILL))

    def reset(*_: object, **__: object) -> None:
        killing.start()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", reset)
    with pytest.raises(ShardError, match=r"worker process was killed.*reset by peer"):
        for _ in range(100):
            next(endless)


def test_batches_hold_what_they_say(solar):
    batch = next(iter(MIMStream(solar, "10", global_batch=6)))
    assert batch.images.shape == (6, 3, 192, 192) and batch.images.dtype == torch.uint8
    assert batch.mask.shape == (6, 6, 6) and batch.mask.dtype == torch.bool
    assert (batch.mask.sum((1, 2)) == 22).all() and len({m.numpy().tobytes() for m in batch.mask}) == 6
    assert (batch.draw_keys >= 0).all() and batch.draw_keys.unique().numel() == 6
    assert draws.draw_keys(0, batch.positions.numpy()).tolist() == batch.draw_keys.tolist()
    bicubic = CropSpec(224, interpolation="bicubic")
    mae = next(iter(MIMStream(solar, "10", global_batch=2, mask_grid=14, masked=147, crops=bicubic)))
    assert mae.mask.shape == (2, 14, 14) and (mae.mask.sum((1, 2)) == 147).all()


def test_crops_have_the_distribution_of_torchvisions_random_resized_crop():
    image = torch.zeros(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.67, 1), (3 / 4, 4 / 3)) for _ in range(4000)], float)
    numbers = draws.uniforms(0, draws.CROP, np.arange(4000), augment.DRAWS_PER_CROP)
    ours = np.array([augment.crop_box(row, 300, 400, (0.67, 1), (3 / 4, 4 / 3)) for row in numbers], float)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 3
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.abs(np.quantile(ours, quantile, 0) - np.quantile(theirs, quantile, 0)).max() < 6
    # Too narrow for any try: the centred box of the nearest ratio that is allowed.
    assert augment.crop_box(numbers[0], 1000, 10, (0.67, 1), (3 / 4, 4 / 3)) == (493, 0, 13, 10)


def test_crops_lie_at_every_place_of_an_image_equally_often():
    """The first and the last row and column are places too: 3 x 4 of them for squares of 8 in 10 x 11 pixels."""
    numbers = draws.uniforms(3, draws.CROP, np.arange(6000), augment.DRAWS_PER_CROP)
    share = 64 / 110
    boxes = [augment.crop_box(row, 10, 11, (share, share), (1.0, 1.0)) for row in numbers]
    assert {box[2:] for box in boxes} == {(8, 8)}
    places, counts = np.unique([box[:2] for box in boxes], axis=0, return_counts=True)
    assert places.tolist() == [[top, left] for top in range(3) for left in range(4)]
    assert np.abs(counts / 500 - 1).max() < 0.2
    # Of the whole range of areas and ratios, boxes begin at the first and end at the last row and column.
    top, left, h, w = np.array([augment.crop_box(row, 30, 40, (0.67, 1), (3 / 4, 4 / 3)) for row in numbers]).T
    assert (top.min(), left.min(), (top + h).max(), (left + w).max()) == (0, 0, 30, 40)
    assert ((top + h == 30) & (h < 30)).any() and ((left + w == 40) & (w < 40)).any()


def test_a_crop_is_pillows_antialiased_resize_of_the_same_box(photos, photographs):
    stream = MIMStream(photos, "100", seed=5, global_batch=16, crops=CropSpec(flip=0.0))
    batch = stream.batch(0)
    boxes = draws.uniforms(5, draws.CROP, np.arange(16), augment.DRAWS_PER_CROP)
    for row, key in enumerate(batch.keys):
        with Image.open(photographs / f"{key}.JPEG") as image:
            top, left, h, w = augment.crop_box(boxes[row], image.height, image.width, (0.67, 1), (3 / 4, 4 / 3))
            crop = image.crop((left, top, left + w, top + h)).resize((192, 192), Image.Resampling.BILINEAR)
        error = (pil_to_tensor(crop).float() - batch.images[row].float()).square().mean()
        assert 10 * np.log10(255**2 / max(float(error), 1e-9)) >= 50
    flipped = MIMStream(photos, "100", seed=5, global_batch=16, crops=CropSpec(flip=1.0)).batch(0)
    assert torch.equal(flipped.images, batch.images.flip(-1))


def test_validation_gives_each_image_once_with_its_own_mask_whatever_the_split(solar):
    def rows(world_size, batch_size, **more):
        found, lengths = {}, set()
        for rank in range(world_size):
            batches = list(ValidationStream(solar, 192, batch_size, rank, world_size, **more))
            lengths.add(len(batches))
            for batch in batches:
                assert len(batch.images) == batch_size
                for row in torch.nonzero(batch.valid)[:, 0].tolist():
                    assert batch.keys[row] not in found
                    found[batch.keys[row]] = (batch.images[row].numpy().tobytes(), batch.mask[row].numpy().tobytes())
        assert len(lengths) == 1
        return found

    alone = rows(1, 10)
    assert set(alone) == set(solar.keys(solar.samples("val")))
    assert rows(3, 4) == alone and rows(2, 7, workers=1) == alone
    some, keys = rows(2, 3, limit=7), solar.keys(solar.samples("val"))
    assert [keys.index(key) for key in some] == [place * len(keys) // 7 for place in (0, 1, 2, 6, 3, 4, 5)]
    assert all(alone[key] == found for key, found in some.items())


def test_validation_crops_are_torchvisions(photos, photographs):
    from torchvision.transforms import v2

    with Image.open(photographs / "class_0" / "photo_03.JPEG") as image:
        pixels = np.array(image)
    theirs = v2.Compose([v2.Resize(192, antialias=True), v2.CenterCrop(192)])(torch.from_numpy(pixels).permute(2, 0, 1))
    ours = augment.resize_and_centre_crop(pixels, 192, 192, "bilinear")
    assert (theirs.int() - ours.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"global_batch": 10, "world_size": 4}, "global_batch=10 does not divide over world_size=4"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"fraction": "30"}, "no fraction '30'; it has 10, 20, 50, 100, val"),
        ({"image_size": 200}, "no multiple of 32"),
        ({"masked": 40}, "masked=40 of a 6 x 6 grid"),
    ],
)
def test_arguments_that_contradict_each_other_are_named(solar, arguments, said):
    with pytest.raises(ValueError, match=said):
        MIMStream(solar, **arguments)


def damage(folder, sample: int, change) -> str:
    """Change the stored bytes of one sample in place; returns its key."""
    index = ShardIndex.load(folder)
    path, offset, size = index.shard_of(sample), index.offset(sample), len(index.read(sample))
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = change(bytes(content[offset : offset + size]))
    path.write_bytes(content)
    return index.key(sample)


def test_a_damaged_image_is_replaced_by_the_same_other_image_everywhere_and_named(own_photo_shards):
    index = ShardIndex.load(own_photo_shards)
    intact = next(iter(MIMStream(index, "100", global_batch=32)))
    bad = damage(own_photo_shards, 10, lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    batch = next(iter(MIMStream(index, "100", global_batch=32)))
    row = intact.keys.index(bad)
    assert batch.skipped[0][0] == bad and "not those that were stored" in batch.skipped[0][1]
    assert batch.keys[row] == index.key(11)
    others = [r for r in range(32) if r != row]
    assert torch.equal(batch.images[others], intact.images[others]) and torch.equal(batch.mask, intact.mask)
    shared = [
        next(iter(MIMStream(index, "100", global_batch=32, rank=r, world_size=4, workers=r % 2))) for r in range(4)
    ]
    assert torch.equal(torch.cat([part.images for part in shared]), batch.images)
    assert [key for part in shared for key, _ in part.skipped] == [bad]


@pytest.mark.parametrize("store", ["bytes", "pixels"])
def test_one_flipped_bit_is_found_where_a_decoder_would_show_another_picture(photographs, tmp_path, store):
    out = tmp_path / "out"
    writer.build(ImageFolder(photographs), out, options=writer.Options(store=store))
    index = ShardIndex.load(out)
    flipped = {damage(out, sample, lambda d: d[:-200] + bytes([d[-200] ^ 4]) + d[-199:]) for sample in range(0, 32, 3)}
    batch = next(iter(MIMStream(index, "100", global_batch=32)))
    assert {key for key, _ in batch.skipped} == flipped and not flipped & set(batch.keys)


def test_too_much_damage_stops_with_the_names(own_photo_shards):
    keys = [damage(own_photo_shards, sample, lambda data: bytes(len(data))) for sample in range(5, 15)]
    index = ShardIndex.load(own_photo_shards)
    with pytest.raises(ShardError, match=r"over the limit of 4.*class_") as caught:
        for _ in MIMStream(index, "100", global_batch=8, max_damaged=4, stop_step=8):
            pass
    assert any(key in str(caught.value) for key in keys)
    with pytest.raises(ShardError, match="over the limit of 9"):
        list(MIMStream(index, "100", global_batch=8, max_damaged=9, stop_step=8, workers=1))
    steps = list(MIMStream(index, "100", global_batch=8, max_damaged=10, stop_step=8))
    assert {key for batch in steps for key, _ in batch.skipped} == set(keys)


def test_a_tar_cut_after_it_was_opened_is_damage_not_a_crash(own_photo_shards):
    index = ShardIndex.load(own_photo_shards)
    last = index.shards[-1]
    index.read(len(index) - 1)
    os.truncate(own_photo_shards / last.file, last.bytes // 2)
    batch = next(iter(MIMStream(index, "100", global_batch=32)))
    assert batch.skipped and all("ends before it" in reason for _, reason in batch.skipped)


def _no_folder(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _edit_table(folder):
    path = folder / "samples.npy"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_no_folder, "no such folder"),
        (lambda f: (f / "index.json").unlink(), "did not finish"),
        (
            lambda f: (f / "train-050-000001.tar").unlink(),
            "train-050-000001.tar is missing: index does not match its tars",
        ),
        (
            lambda f: os.truncate(f / "train-050-000001.tar", 4096),
            "train-050-000001.tar has 4,096 bytes and the index says",
        ),
        (lambda f: (f / "samples.npy").unlink(), "samples.npy is missing"),
        (_edit_table, "samples.npy is not the sample table"),
        (lambda f: (f / "index.json").write_text('{"format": '), "not valid JSON"),
        (lambda f: (f / "index.json").write_text('{"format": "mimscale-shards", "version": 9}'), "format version 9"),
        (
            lambda f: (f / "index.json").write_text('{"format": "mimscale-shards", "version": 1}'),
            "is not as it was written",
        ),
        (lambda f: (f / "index.json").write_text("[]"), "not the index of a shard folder"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(own_photo_shards, harm, said):
    harm(own_photo_shards)
    with pytest.raises(ShardError, match=said):
        ShardIndex.load(own_photo_shards)


def test_the_index_of_another_build_is_not_taken_for_this_ones(photographs, own_photo_shards, tmp_path):
    writer.build(ImageFolder(photographs), tmp_path / "other", options=writer.Options(samples_per_shard=5, seed=1))
    (own_photo_shards / "index.json").write_bytes((tmp_path / "other" / "index.json").read_bytes())
    with pytest.raises(ShardError, match=r"does not match its tars|not the sample table"):
        ShardIndex.load(own_photo_shards)
    assert len(verify(own_photo_shards)) > len(list(own_photo_shards.glob("*.tar"))) // 2


def test_an_index_stays_small_when_it_travels(solar):
    travelled = pickle.loads(pickle.dumps(solar))
    assert len(pickle.dumps(solar)) < 20_000
    assert travelled.read(7) == solar.read(7)


def test_png_with_sixteen_bits_and_alpha_decode_to_eight_bit_rgb():
    import io

    from mimscale.data.decode import decode_rgb

    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    assert struct.unpack(">B", buffer.getvalue()[24:25]) == (16,)
    assert np.array_equal(decode_rgb(buffer.getvalue())[:, :, 0], deep // 257)
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 4), 200, np.uint8)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).shape == (4, 5, 3)


def test_the_index_file_reads_back_as_it_was_written(solar_shards):
    path = solar_shards / "index.json"
    assert Index.from_json(path.read_bytes(), path).to_json() == path.read_bytes()


def test_seven_shards_on_four_ranks_with_three_workers_neither_hang_nor_repeat_nor_drop(photographs, tmp_path):
    writer.build(ImageFolder(photographs), tmp_path, options=writer.Options(samples_per_shard=6))
    index = ShardIndex.load(tmp_path)
    assert len(index.shards) == 7
    seen: Counter = Counter()
    for rank in range(4):
        stream = MIMStream(
            index, "100", image_size=32, global_batch=12, rank=rank, world_size=4, workers=3, stop_step=8
        )
        for batch in stream:
            seen.update(batch.keys)
    # 8 steps of 12 are three epochs of 32.
    assert seen == Counter({key: 3 for key in index.keys(index.samples("100"))})


def test_workers_get_cores_of_their_own_where_there_are_enough(monkeypatch):
    from mimscale.data.stream.workers import cores_for

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        shares.append(cores_for(7))
    assert shares == [list(range(1, 8)), list(range(9, 16))]
    assert cores_for(8) == []


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), max_size=40).map(lambda sizes: [*sizes, 3]), seed=st.integers(0, 2**40))
def test_fractions_are_exact_nested_and_within_one_of_each_classs_share(sizes, seed):
    from mimscale.data.shards import fractions

    counts = fractions.class_counts(np.array(sizes), seed=seed)
    assert counts.sum(1).tolist() == [round(p * sum(sizes) / 100) for p in fractions.FRACTIONS]
    assert (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - np.outer(fractions.FRACTIONS, sizes) / 100).max() <= 1
    labels = np.repeat(np.arange(len(sizes)), sizes)
    drawn = fractions.assign(labels, seed=seed)
    for number, row in enumerate(counts):
        assert np.array_equal(np.bincount(labels[drawn <= number], minlength=len(sizes)), row)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(-(2**63), 2**64), first=st.integers(0, 2**50), count=st.integers(1, 40))
def test_a_draw_belongs_to_its_position_and_to_nothing_else(seed, first, count):
    positions = np.arange(first, first + count)
    together = draws.uniforms(seed, draws.CROP, positions, 5)
    assert ((together >= 0) & (together < 1)).all()
    for row in range(count):
        assert np.array_equal(draws.uniforms(seed, draws.CROP, positions[row : row + 1], 9)[0, :5], together[row])
        assert draws.draw_keys(seed, positions[row : row + 1])[0] == draws.draw_keys(seed, positions)[row] >= 0
    assert not np.array_equal(draws.uniforms(seed + 1, draws.CROP, positions, 5), together)
    assert not np.array_equal(draws.uniforms(seed, draws.FLIP, positions, 5), together)


def test_draws_are_uniform_and_uncorrelated():
    numbers = draws.uniforms(0, draws.CROP, np.arange(20_000), 8)
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.01 and np.abs(numbers.var(0) - 1 / 12).max() < 0.003
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.03
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03
    masks = draws.random_masks(0, np.arange(20_000), 6, 22)
    assert np.abs(masks.mean(0) - 22 / 36).max() < 0.015
    first = np.array([draws.permutation(50, seed, draws.ORDER, 0)[0] for seed in range(5000)])
    assert np.bincount(first, minlength=50).min() > 60


def test_nvimgcodecs_cpu_backend_gives_the_same_batches_and_leaves_damage_to_the_usual_way(own_photo_shards):
    pytest.importorskip("nvidia.nvimgcodec")
    bad = damage(own_photo_shards, 10, lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    index = ShardIndex.load(own_photo_shards)
    usual = next(iter(MIMStream(index, "100", global_batch=32)))
    theirs = next(iter(MIMStream(index, "100", global_batch=32, crops=CropSpec(decoder="nvimgcodec"))))
    others = [row for row, key in enumerate(usual.keys) if theirs.keys[row] == key]
    assert len(others) >= 31 and bad in dict(usual.skipped)
    assert (usual.images[others].int() - theirs.images[others].int()).abs().max() <= 1
    assert torch.equal(usual.mask, theirs.mask)
    with pytest.raises(ValueError, match="goes with decoder='nvimgcodec' and workers=0"):
        CropSpec(device="cuda:0")


@pytest.mark.root
@pytest.mark.parametrize("size", ["1m", "4m"])  # of batches of 1.8 MB: no room for one, room for some of those ahead
def test_a_small_shared_memory_is_said_and_changes_nothing(solar, solar_shards, size):
    code = f"""
import hashlib, time
from mimscale.data import MIMStream, ShardIndex
stream = MIMStream(ShardIndex.load({str(solar_shards)!r}), "100", image_size=192, global_batch=16, stop_step=12, workers=2)
found = []
for batch in stream:
    found.append(hashlib.sha256(batch.images.numpy().tobytes()).hexdigest())
    time.sleep(1 if batch.step == 0 else 0)  # as a first step: workers get ahead
print(found)
"""
    mounted = (
        f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c '{code.replace(chr(39), chr(34))}'"
    )
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    done = subprocess.run(["unshare", "--mount", "sh", "-c", mounted], capture_output=True, text=True, timeout=100)
    here = MIMStream(solar, "100", image_size=192, global_batch=16, stop_step=12)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == [
        hashlib.sha256(batch.images.numpy().tobytes()).hexdigest() for batch in here
    ]
    assert done.stderr.count("--shm-size") == 1 and "/dev/shm" in done.stderr
