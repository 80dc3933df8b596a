"""Shards in an S3 bucket: a real server on this machine, the real client."""

from __future__ import annotations

import pytest
import torch

from mimscale.data import MIMStream, ShardError, ShardIndex
from mimscale.data.shards import remote

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, photo_shards, monkeypatch):
    """A client, and ``s3://pretraining/photos`` with the shards of ``photo_shards``; users name their server like this, too."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pretraining")
    for path in photo_shards.iterdir():
        client.put_object(Bucket="pretraining", Key=f"photos/{path.name}", Body=path.read_bytes())
    s3fs.S3FileSystem.clear_instance_cache()
    yield client
    for entry in client.list_objects_v2(Bucket="pretraining")["Contents"]:
        client.delete_object(Bucket="pretraining", Key=entry["Key"])
    client.delete_bucket(Bucket="pretraining")


def test_batches_from_a_bucket_are_those_of_the_folder(bucket, photo_shards, tmp_path):
    local, index = ShardIndex.load(photo_shards), ShardIndex.load("s3://pretraining/photos", cache=tmp_path)
    for workers in (0, 2):
        pairs = zip(MIMStream(index, "100", stop_step=2, global_batch=16, workers=workers),
                    MIMStream(local, "100", stop_step=2, global_batch=16), strict=True)  # fmt: skip
        assert all(torch.equal(a.images, b.images) and a.keys == b.keys for a, b in pairs)
    copies = {path.name: path.read_bytes() for path in tmp_path.glob("*/*.tar")}
    assert copies == {shard.file: (photo_shards / shard.file).read_bytes() for shard in local.shards}


def test_an_object_that_changed_or_is_gone_is_named(bucket, photo_shards, tmp_path):
    index = ShardIndex.load("s3://pretraining/photos", cache=tmp_path)
    name = index.shards[1].file
    changed = bytearray((photo_shards / name).read_bytes())
    changed[2000] ^= 1
    bucket.put_object(Bucket="pretraining", Key=f"photos/{name}", Body=bytes(changed))
    with pytest.raises(ShardError, match=f"s3://pretraining/photos/{name}: could not be fetched.*SHA-256"):
        index.fetch(1)
    bucket.put_object(Bucket="pretraining", Key=f"photos/{name}", Body=bytes(changed[:9000]))
    with pytest.raises(ShardError, match=f"{name}.*9,000 bytes came, the index says"):
        index.fetch(1)
    bucket.delete_object(Bucket="pretraining", Key=f"photos/{name}")
    with pytest.raises(ShardError, match=f"{name}: the server has no such file"):
        index.fetch(1)
    # Put back, it is fetched: nothing of the failures is remembered.
    bucket.put_object(Bucket="pretraining", Key=f"photos/{name}", Body=(photo_shards / name).read_bytes())
    assert index.fetch(1).read_bytes() == (photo_shards / name).read_bytes()
    with pytest.raises(ShardError, match=r"s3://nobodys/photos/index\.json: the server has no such file"):
        ShardIndex.load("s3://nobodys/photos", cache=tmp_path)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_bucket_that_cannot_be_reached_is_said(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ShardError, match=r"index\.json: could not be fetched in 6 attempts"):
        ShardIndex.load("s3://pretraining/photos", cache=tmp_path)
