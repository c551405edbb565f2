"""Object stores as sources: a real client against an S3 of our own, and others that fsspec knows."""

import io
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anomaly_vae import DataError, Engine, external_sort
from anomaly_vae.paths import order_of
from anomaly_vae.scanning import Scan
from anomaly_vae.sources import source_of
from anomaly_vae.tables import reading

MOST = 1 << 20
KEYS = [f"in/{i % 40:02}/{i % 3}/{i}.png" for i in range(2500)]
ODD = [
    "a.png", "a/x.png", "a-b/x.png", "a b.png", "a//y.png", "a/x.png/z.png", "é.png", "e\u0301.png", "😀/x.png",
    "%41.png",
    "a+b.png", "a&b<c>.png", "a?b#c.png", "a\\b.png", "a\nb.png", "*.png", "[1].png", "~/x.png", "../up.png", "A.PNG",
    "'\".png", "./dot.png", "/abs.png",
]  # fmt: skip
LEFT_OUT = ["notes.txt", ".hidden.png", "a/.in/x.png", "folder/", "folder.png/"]


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def environment(server, monkeypatch):
    """What an operator sets, and nothing that this machine has."""
    from s3fs import S3FileSystem

    for name, value in {
        "AWS_ENDPOINT_URL_S3": server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield monkeypatch
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def client(server):
    import boto3

    return boto3.client(
        "s3", endpoint_url=server, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )


def fill(client, bucket, objects):
    """Straight into the server's memory: a request for each would take ten times as long."""
    from moto.s3.models import s3_backends

    client.create_bucket(Bucket=bucket)
    for key, data in objects.items():
        s3_backends["123456789012"]["aws"].put_object(bucket, key, data)


@pytest.fixture(scope="module")
def many(client):
    fill(client, "many", dict.fromkeys(KEYS, b""))


@pytest.fixture(scope="module")
def odd(client):
    fill(client, "odd", {key: key.encode() for key in ODD + LEFT_OUT})


def paths(source):
    return [entry.path for entry in source]


def reason(entry):
    with pytest.raises(OSError) as caught:
        entry.read(10)
    assert caught.value.strerror, "what a row shows"
    return caught.value.strerror


def test_many_keys_come_in_the_order_of_paths(environment, many):
    source = source_of("s3://many/in", MOST)
    assert (source.sorted, source.plain, source.identity) == (True, False, "s3://many/in")
    found = paths(source)
    assert found == sorted((f"s3://many/{key}" for key in KEYS), key=order_of)
    assert paths(source_of("s3://many/in/03/", MOST)) == [path for path in found if "/in/03/" in path]
    assert paths(source_of("s3://many/in/03/0/3.png", MOST)) == ["s3://many/in/03/0/3.png"]
    assert paths(source_of("s3://many/i", MOST)) == []


def test_a_flat_bucket_is_listed_page_by_page_in_little_memory(environment, client, monkeypatch):
    keys = [f"{i:04}{'x' * 100}.png" for i in range(1200)]
    fill(client, "flat", dict.fromkeys(keys, b""))
    source = source_of("s3://flat", MOST)
    asked, page = [], source._page
    monkeypatch.setattr(source, "_page", lambda folder, **more: asked.append(more) or page(folder, MaxKeys=100, **more))
    monkeypatch.setattr("anomaly_vae.object_store.in_order", partial(external_sort.in_order, most=50))
    assert paths(source) == [f"s3://flat/{key}" for key in keys]
    assert len(asked) == 12


def test_odd_keys_are_listed_and_read_and_in_order(environment, odd):
    entries = list(source_of("s3://odd", MOST))
    found = [entry.path for entry in entries]
    assert found == sorted(found, key=order_of)
    expected = {f"s3://odd/{key}".replace("\\", "\\\\"): key for key in ODD}
    assert set(found) == set(expected)
    assert len(found) == len(ODD)
    for entry in entries:
        if "\n" in entry.path:
            continue  # the server of the tests does not find it
        assert entry.read(MOST) == expected[entry.path].encode()
        assert entry.size == len(expected[entry.path].encode())
        assert entry.mtime > 1.7e9
        assert entry.read(3) == expected[entry.path].encode()[:3]


def test_access_points_have_slashes_in_their_names(environment):
    asked = r"cannot be listed: .*http://mine-123456789012\..*prefix=in%2F03%2F"
    with pytest.raises(DataError, match=asked):
        source_of("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/mine/in/03", MOST)


def test_what_cannot_be_listed_is_refused_in_one_line(environment, many):
    for url, says in (
        (
            "s3://no-such-bucket/in",
            "s3://no-such-bucket/in cannot be listed: .*bucket.*; look at its name and your keys",
        ),
        ("s3://", "name a bucket"),
        ("memory://nowhere", "cannot be listed"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            source_of(url, MOST)
        assert "\n" not in str(caught.value)


def test_a_store_that_does_not_answer_or_has_no_keys_is_told(environment):
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://many cannot be listed: .*127\.0\.0\.1:9"):
        source_of("s3://many", MOST)


def test_a_denied_bucket_is_told(environment, monkeypatch):
    class Denied(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with serving(Denied) as address:
        environment.setenv("AWS_ENDPOINT_URL_S3", address)
        with pytest.raises(DataError, match="s3://many cannot be listed: Access Denied"):
            source_of("s3://many", MOST)


class serving:
    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_objects_that_went_or_are_empty_are_entries_with_their_reason(environment, client):
    fill(client, "going", {"a.png": b"1", "b.png": b"1", "empty.png": b""})
    first, second, empty = source_of("s3://going", MOST)
    client.delete_object(Bucket="going", Key="b.png")
    assert first.read(9) == b"1"
    assert "exist" in reason(second) or "No such" in reason(second)
    assert empty.read(9) == b""


def test_a_prefix_that_cannot_be_listed_is_an_entry(environment, odd, monkeypatch):
    source = source_of("s3://odd", MOST)
    page = source._page

    def refusing(folder, **more):
        if folder == "odd/a/":
            raise PermissionError(13, "Access Denied")
        return page(folder, **more)

    monkeypatch.setattr(source, "_page", refusing)
    (broken,) = [entry for entry in source if entry.path == "s3://odd/a"]
    assert reason(broken) == "Access Denied"


def test_a_scan_of_a_bucket_goes_on_where_it_was(
    environment, client, tiny_detector, digits_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("anomaly_vae.scan_ledger._ROWS", 8)
    pictures = sorted((digits_folder / "good").iterdir())[:40]
    objects = {f"{i % 3}/{picture.name}": picture.read_bytes() for i, picture in enumerate(pictures)}
    fill(client, "scan", {**objects, "1/broken.png": b"no picture"})
    engine, out = Engine(tiny_detector, "cpu", max_batch=8), tmp_path / "out.jsonl"

    def stop(counts):
        if counts.images > 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Scan(engine, source_of("s3://scan", MOST), out) as running:
        running.run(stop)
    client.put_object(Bucket="scan", Key="0/0.png", Body=pictures[0].read_bytes())
    seen = []
    with Scan(engine, source_of("s3://scan", MOST), out) as running:
        assert running.ledger.begun
        running.finish(running.run(lambda counts: seen.append(counts.images)))
    assert seen[-1] < 36
    rows = [row for table in reading(out, running.schema) for row in table.to_pylist()]
    found = [row["path"] for row in rows]
    assert found == sorted(found, key=order_of)
    assert len(set(found)) == len(found) == 42
    assert [row["path"] for row in rows if row["error"]] == ["s3://scan/1/broken.png"]


def test_other_stores_that_fsspec_knows(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.png", "a/x.png", "a-b/x.png", "a/.h/x.png", "n.txt"):
        memory.pipe(f"/pictures/{name}", name.encode())
    entries = list(source_of("memory://pictures", MOST))
    assert [entry.path for entry in entries] == [
        f"memory:///pictures/{name}" for name in ("a/x.png", "a-b/x.png", "a.png")
    ]
    assert entries[0].read(3) == b"a/x"
    assert entries[0].size == 7
    assert entries[0].mtime is not None


def test_a_page_on_the_web_with_links_up_and_elsewhere(tmp_path):
    for name in ("in/b.png", "in/a/x.png", "up.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    class Linking(SimpleHTTPRequestHandler):
        def list_directory(self, path):
            page = super().list_directory(path)
            links = (
                b'<a href="/">up</a> <a href="../">up</a> <a href="/up.png">x</a> <a href="http://x.org/y.png">y</a>'
            )
            return io.BytesIO(page.read().replace(b"</body>", links + b" " * 1000)[: len(page.getvalue())])

        def log_message(self, *_):
            pass

    with serving(partial(Linking, directory=str(tmp_path))) as address:
        entries = list(source_of(f"{address}/in", MOST))
        assert [entry.path for entry in entries] == [f"{address}/in/a/x.png", f"{address}/in/b.png"]
        assert entries[0].read(4) == b"in/a"


def test_a_client_that_is_not_there_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r"s3fs.*pip install 'anomaly-vae\[s3\]'") as caught:
        source_of("s3://many/in", MOST)
    assert "\n" not in str(caught.value)
