"""Shards behind a real HTTP server that works, stops in mid-transfer, lies, or is not there."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from mimscale.data import MIMStream, SampleOrder, ShardError, ShardIndex
from mimscale.data.shards import remote

pytest.importorskip("aiohttp")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts what is asked for, and can cut the first transfers of a file."""

    cut: dict[str, int]
    asked: list[str]
    lock = threading.Lock()

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        with self.lock:
            self.asked.append(name)
            cut = self.cut.get(name, 0) > 0
            self.cut[name] = self.cut.get(name, 0) - 1
        if not cut:
            return super().do_GET()
        content = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.connection.close()

    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path, cut: dict[str, int] | None = None):
    handler = type("Own", (Handler,), {"cut": dict(cut or {}), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)


def test_remote_batches_are_those_of_the_folder_and_each_shard_is_fetched_once(photo_shards, tmp_path):
    local = ShardIndex.load(photo_shards)
    with served(photo_shards) as (url, handler):
        index = ShardIndex.load(url, cache=tmp_path)
        for workers in (0, 2):
            pairs = zip(MIMStream(index, "100", stop_step=3, global_batch=16, workers=workers),
                        MIMStream(local, "100", stop_step=3, global_batch=16), strict=True)  # fmt: skip
            assert all(torch.equal(a.images, b.images) and a.keys == b.keys for a, b in pairs)
        tars = [name for name in handler.asked if name.endswith(".tar")]
        assert sorted(tars) == sorted(shard.file for shard in local.shards)
    # The copies outlive the server.
    assert index.read(0) == local.read(0)


def test_a_transfer_that_breaks_off_is_tried_again(photo_shards, tmp_path):
    name = ShardIndex.load(photo_shards).shards[0].file
    with served(photo_shards, {name: 3, "samples.npy": 1}) as (url, handler):
        index = ShardIndex.load(url, cache=tmp_path)
        assert index.read(0) == ShardIndex.load(photo_shards).read(0)
        assert handler.asked.count(name) == 4 and handler.asked.count("samples.npy") == 2
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_server_killed_in_mid_transfer_is_an_error_that_names_the_shard(photo_shards, tmp_path):
    name = ShardIndex.load(photo_shards).shards[2].file
    # A process of its own, so that it can be killed with a transfer under way.
    code = textwrap.dedent(f"""
        import http.server, functools, time
        class Slow(http.server.SimpleHTTPRequestHandler):
            def copyfile(self, source, output):
                if self.path.endswith({name!r}):
                    output.write(source.read(70_000)); output.flush(); time.sleep(60)
                super().copyfile(source, output)
            def log_message(self, *_): pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory={str(photo_shards)!r}))
        print(server.server_port, flush=True)
        server.serve_forever()
    """)
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        index = ShardIndex.load(f"http://127.0.0.1:{int(server.stdout.readline())}", cache=tmp_path)
        sample = int(np.flatnonzero(index.shard_numbers(np.arange(len(index))) == 2)[0])

        def kill_in_mid_transfer():
            deadline = time.monotonic() + 30
            while not list(tmp_path.rglob(f"*{name}.partial*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            server.kill()

        threading.Thread(target=kill_in_mid_transfer).start()
        began = time.monotonic()
        with pytest.raises(ShardError, match=rf"{name}: could not be fetched in 6 attempts"):
            index.read(sample)
        assert time.monotonic() - began < 30
    finally:
        server.kill()
        server.wait()
    assert not list(tmp_path.rglob("*.partial*"))


def test_bytes_that_are_not_those_of_the_index_are_refused(own_photo_shards, tmp_path):
    name = ShardIndex.load(own_photo_shards).shards[1].file
    content = bytearray((own_photo_shards / name).read_bytes())
    content[2000] ^= 1
    (own_photo_shards / name).write_bytes(content)
    with served(own_photo_shards) as (url, _):
        index = ShardIndex.load(url, cache=tmp_path / "cache")
        with pytest.raises(ShardError, match=f"{name}.*SHA-256"):
            index.fetch(1)
        (own_photo_shards / name).unlink()
        with pytest.raises(ShardError, match=f"{name}: the server has no such file"):
            index.fetch(1)
        with pytest.raises(ShardError, match=r"index\.json: the server has no such file"):
            ShardIndex.load(f"{url}/elsewhere", cache=tmp_path / "cache")


def test_the_cache_stays_within_its_bound_and_the_longest_unused_goes(photo_shards, tmp_path):
    local = ShardIndex.load(photo_shards)
    sizes = [shard.bytes for shard in local.shards]
    bound = sum(sizes[:3]) + 1000
    with served(photo_shards) as (url, _):
        index = ShardIndex.load(url, cache=tmp_path, cache_bytes=bound)
        for shard in range(len(sizes)):
            index.fetch(shard)
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= bound
        assert index.fetch(len(sizes) - 1).exists() and not (index.root / local.shards[0].file).exists()
        # Every sample can be read all the same, in any order.
        assert [index.read(s) for s in range(len(index))] == [local.read(s) for s in range(len(index))]


def _read_everything(url, cache, keys):
    index = ShardIndex.load(url, cache=cache)
    keys.put([len(index.read(sample)) for sample in range(len(index))])


def test_processes_that_want_a_shard_at_once_fetch_it_once(photo_shards, tmp_path):
    context = multiprocessing.get_context("fork")
    with served(photo_shards) as (url, handler):
        results = context.Queue()
        readers = [context.Process(target=_read_everything, args=(url, tmp_path, results)) for _ in range(3)]
        for reader in readers:
            reader.start()
        sizes = [results.get(timeout=60) for _ in readers]
        for reader in readers:
            reader.join()
        assert sizes[0] == sizes[1] == sizes[2]
        tars = [name for name in handler.asked if name.endswith(".tar")]
        assert len(tars) == len(set(tars))


def test_coming_shards_are_fetched_while_the_present_ones_are_read(solar_shards, tmp_path):
    with served(solar_shards) as (url, handler):
        index = ShardIndex.load(url, cache=tmp_path)
        stream = iter(MIMStream(index, "100", global_batch=8, shuffle="window", window=2, stop_step=27))
        next(stream)
        tars = set()
        deadline = time.monotonic() + 20
        while len(tars) < len(index.shard_files("100")) and time.monotonic() < deadline:
            tars = {name for name in handler.asked if name.endswith(".tar")}
            time.sleep(0.02)
        assert len(tars) == len(index.shard_files("100"))
        stream.close()


def test_a_window_shuffle_keeps_to_few_shards_and_still_shows_every_sample_once(solar_shards):
    index = ShardIndex.load(solar_shards)
    order = SampleOrder(index, "100", 4, shuffle="window", window=3)
    first, second = (order.indices(epoch, len(order)) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), order.samples) and np.array_equal(np.sort(second), order.samples)
    assert not np.array_equal(first, second)
    shards = index.shard_numbers(first)
    # At any time the samples of a batch come from one window, or from two where one ends and the next begins.
    assert max(len(np.unique(shards[start : start + 20])) for start in range(len(shards) - 20)) <= 6
    runs = 1 + int(
        np.count_nonzero([set(shards[max(0, i - 60) : i]).isdisjoint({shards[i]}) for i in range(1, len(shards))])
    )
    assert runs <= len(index.shard_files("100")) + 1
    with pytest.raises(ValueError, match="shuffle='some'"):
        SampleOrder(index, "100", shuffle="some")


def test_a_cache_that_cannot_be_written_is_said(photo_shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="the cache cannot be written"):
        ShardIndex.load("http://127.0.0.1:9/x", cache=tmp_path / "file")
    shutil.rmtree(tmp_path, ignore_errors=True)
