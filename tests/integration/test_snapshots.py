"""Snapshots in a directory and in a real S3: what is uploaded is found, and nothing half."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.proxy import TcpProxy
from tests.s3_server import BUCKET, S3Server, credentials
from tests.servers import free_port, wait_until
from warmup.backend import Backend, BackendOptions, open_backend
from warmup.documents import BackendDocument
from warmup.errors import AccessDenied, Conflict, Damaged, NotThere, Unreachable
from warmup.snapshots import SnapshotStore
from warmup.uploader import Uploader

_WINDOW_MS = 600_000
_FAST = {"timeout_s": 2.0, "attempts": 2}


@dataclass
class Info:
    """What reading a log says, for logs that are any bytes."""

    host: str = "host-1"
    window_start_ms: int = 1_780_000_200_000
    version: int = 1
    window_ms: int = _WINDOW_MS
    sample: float = 0.1
    by: str = "requests"
    complete: bool = True
    requests: int = 10
    keys: int = 1000
    distinct_keys: int = 100
    dropped_keys: int = 0
    namespaces: list[tuple[str, str, int, int]] = field(
        default_factory=lambda: [("pin", "plain", 1000, 100)]
    )


Open = Callable[..., Backend]


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/snapshots"
    request.getfixturevalue("s3_server")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def connect(url: str, request: pytest.FixtureRequest) -> Open:
    def opened(**options: object) -> Backend:
        if url.startswith("s3"):
            options = {"endpoint": request.getfixturevalue("s3_server").endpoint, **options}
        return open_backend(url, BackendOptions(**options))  # type: ignore[arg-type]

    return opened


@pytest.fixture
def backend(connect: Open) -> Backend:
    return connect(part_bytes=5 << 20)


@pytest.fixture
def store(backend: Backend) -> SnapshotStore:
    return SnapshotStore(backend, "pins", "separate")


def log_file(folder: Path, name: str = "1780000200000-0123456789abcdef", size: int = 1000) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.fcrl"
    path.write_bytes(os.urandom(size))
    return path


# ---- objects


def test_objects_come_back_as_they_were(backend: Backend, tmp_path: Path) -> None:
    backend.put("a/b", b"bytes")
    assert backend.read("a/b") == b"bytes"
    file = log_file(tmp_path, size=11 << 20)  # in three parts
    backend.put_file("a/file", file)
    assert backend.read("a/file") == file.read_bytes()
    assert [(each.key, each.size) for each in backend.find("a/")] == [
        ("a/b", 5),
        ("a/file", 11 << 20),
    ]
    backend.delete("a/b")
    backend.delete("a/b")
    assert [each.key for each in backend.find("")] == ["a/file"]
    with pytest.raises(NotThere):
        backend.read("a/b")


def test_conditional_writes_have_one_winner(connect: Open) -> None:
    backends = [connect() for _ in range(4)]
    won: list[int] = []

    def write(number: int) -> None:
        try:
            backends[number].put("doc", b"%d" % number, if_absent=True)
        except Conflict:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert backends[0].read("doc") == b"%d" % won[0]


def test_a_document_changes_only_from_what_was_seen(backend: Backend) -> None:
    document = BackendDocument(backend, "shared")
    nothing, tag = document.read()
    assert nothing is None
    assert document.write(b"1", tag)
    assert not document.write(b"2", tag), "somebody was first"
    data, tag = document.read()
    assert data == b"1"
    assert document.write(b"2", tag)
    assert not document.write(b"3", tag)
    assert document.read()[0] == b"2"


# ---- snapshots


def test_an_upload_is_found_and_read(store: SnapshotStore, tmp_path: Path) -> None:
    path = log_file(tmp_path)
    manifest = store.upload(path, Info(), time.time(), shard_count=64, shards=[1, 2, 3, 9])
    (found,) = store.find()
    assert found.manifest == manifest
    assert manifest.shards == "1-3,9"
    assert "pins/separate/4-" in manifest.log
    assert "/20260528T203000Z/" in manifest.log
    assert store.read(found) == path.read_bytes()
    store.upload(path, Info(), time.time(), shard_count=64, shards=[1, 2, 3, 9])  # again
    assert len(store.find()) == 1


def test_a_log_without_its_manifest_is_not_there(store: SnapshotStore, backend: Backend) -> None:
    backend.put("pins/separate/all/20260528T203000Z/host-1-x.fcrl", b"half")
    assert store.find() == []


def test_the_freshest_are_chosen_over_hosts(store: SnapshotStore, tmp_path: Path) -> None:
    for window in range(3):
        for host in ("a", "b", "c"):
            info = Info(host=host, window_start_ms=1_780_000_200_000 + window * _WINDOW_MS)
            store.upload(log_file(tmp_path, f"{window}-{host}"), info, time.time())
            time.sleep(0.02)  # the store's times tell them apart
    now = time.time() + 5
    chosen = store.freshest(windows=2, max_age_s=3600, hosts=2, now=now)
    starts = [(each.manifest.window_start_ms - 1_780_000_200_000) // _WINDOW_MS for each in chosen]
    assert starts == [2, 2, 1, 1]
    assert store.freshest(windows=2, max_age_s=10, hosts=2, now=now + 3600) == []


def test_a_host_whose_clock_is_ahead_does_not_hide_the_others(
    store: SnapshotStore, tmp_path: Path
) -> None:
    ahead = Info(host="ahead", window_start_ms=1_780_000_200_000 + 10_000 * _WINDOW_MS)
    store.upload(log_file(tmp_path, "ahead"), ahead, time.time() + 6_000_000)
    time.sleep(1.1)  # S3 tells times by the second
    store.upload(log_file(tmp_path, "right"), Info(host="right"), time.time())
    (first,) = store.freshest(windows=1, max_age_s=3600, hosts=8, now=time.time() + 5)
    assert first.manifest.host == "right"


def test_logs_of_other_shards_and_empty_ones_are_left_out(
    store: SnapshotStore, tmp_path: Path
) -> None:
    store.upload(log_file(tmp_path, "1"), Info(), time.time(), shard_count=8, shards=[0, 1])
    store.upload(log_file(tmp_path, "2"), Info(), time.time(), shard_count=8, shards=[6, 7])
    store.upload(log_file(tmp_path, "3"), Info(keys=0), time.time(), shard_count=8, shards=[1])

    def freshest(*shards: int) -> list[str]:
        found = store.freshest(
            windows=9,
            max_age_s=3600,
            hosts=9,
            now=time.time() + 5,
            shard_count=8,
            shards=set(shards),
        )
        return [each.manifest.shards for each in found]

    assert freshest(1, 5) == ["0-1"]
    assert freshest(5) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_log_is_refused(
    store: SnapshotStore, backend: Backend, tmp_path: Path, damage: str
) -> None:
    path = log_file(tmp_path)
    manifest = store.upload(path, Info(), time.time())
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    if damage == "flip":
        backend.put(manifest.log, bytes(data))
    elif damage == "cut":
        backend.put(manifest.log, path.read_bytes()[:-1])
    else:
        backend.delete(manifest.log)
    (found,) = store.find()
    with pytest.raises(Damaged):
        store.read(found)


def test_bad_and_newer_manifests_are_left_out_and_told(
    store: SnapshotStore, backend: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = store.upload(log_file(tmp_path), Info(), time.time())
    folder = manifest.log.rpartition("/")[0]
    good = json.loads(manifest.model_dump_json())
    backend.put(f"{folder}/newer.json", json.dumps(good | {"version": 2, "later": 1}).encode())
    backend.put(f"{folder}/garbage.json", b"{")
    backend.put(f"{folder}/elsewhere.json", json.dumps(good | {"log": "other/x.fcrl"}).encode())
    backend.put(f"{folder}/wrong.json", json.dumps(good | {"size": -1}).encode())
    assert [each.manifest for each in store.find()] == [manifest]
    for part in ("of version 2", "garbage.json is no manifest", "names a log elsewhere", "size"):
        assert part in caplog.text


def test_old_ones_expire(store: SnapshotStore, backend: Backend, tmp_path: Path) -> None:
    store.upload(log_file(tmp_path), Info(), time.time())
    backend.put("pins/separate/all/20260528T203000Z/orphan.fcrl", b"half")
    assert store.expire(3600, time.time()) == 0
    assert store.expire(3600, time.time() + 7200) == 1, "the manifest; logs may be under way"
    assert store.find() == []
    assert store.expire(3600, time.time() + 200_000) == 2
    assert list(backend.find("pins/")) == []


# ---- the uploader


def _inspect(data: memoryview) -> Info:
    if bytes(data[:3]) == b"bad":
        raise ValueError("not a log")
    return Info()


@pytest.fixture
def start_uploader(store: SnapshotStore, tmp_path: Path) -> Iterator[Callable[..., Uploader]]:
    started: list[Uploader] = []

    def start(to: SnapshotStore = store, **options: float) -> Uploader:
        settings = {"retention_s": 3600.0, "poll_s": 0.05, **options}
        uploader = Uploader(tmp_path / "log", to, _inspect, **settings)  # type: ignore[arg-type]
        uploader.start()
        started.append(uploader)
        return uploader

    yield start
    for uploader in started:
        assert uploader.stop(10)


def test_finished_windows_are_uploaded_and_go(
    start_uploader: Callable[..., Uploader], store: SnapshotStore, tmp_path: Path
) -> None:
    first = log_file(tmp_path / "log", "1")
    (tmp_path / "log" / "2.fcrl.part").write_bytes(b"still written")
    uploader = start_uploader()
    wait_until(lambda: not first.exists())
    log_file(tmp_path / "log", "3")
    wait_until(lambda: uploader.state.uploaded == 2)
    assert len(store.find()) == 2
    assert (tmp_path / "log" / "2.fcrl.part").exists()
    assert uploader.state.pending == 0


def test_damaged_and_old_windows_go_unsent(
    start_uploader: Callable[..., Uploader], store: SnapshotStore, tmp_path: Path
) -> None:
    log_file(tmp_path / "log", "1").write_bytes(b"bad")
    old = log_file(tmp_path / "log", "2")
    os.utime(old, (1, 1))
    (tmp_path / "log" / "3.fcrl").touch()  # empty
    uploader = start_uploader()
    wait_until(lambda: uploader.state.dropped == 3)
    assert store.find() == []


# ---- what an S3 may do


def _s3(endpoint: str, bucket: str = BUCKET, **options: object) -> SnapshotStore:
    settings = BackendOptions(endpoint=endpoint, **{**_FAST, **options})  # type: ignore[arg-type]
    url = f"s3://{bucket}/{uuid.uuid4().hex}"
    return SnapshotStore(open_backend(url, settings), "pins", "separate")


def test_no_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    store = _s3(s3_server.endpoint, "no-such-bucket")
    with pytest.raises(NotThere, match="no bucket no-such-bucket"):
        store.find()
    with pytest.raises((NotThere, AccessDenied), match="bucket"):  # this one may not make one
        store.upload(log_file(tmp_path), Info(), time.time())


def test_no_network(tmp_path: Path) -> None:
    with credentials():
        store = _s3(f"http://127.0.0.1:{free_port()}")
        with pytest.raises(Unreachable, match="does not answer"):
            store.find()
        with pytest.raises(Unreachable):
            store.upload(log_file(tmp_path), Info(), time.time())


@pytest.mark.parametrize("pair", [("warm-access", "wrong secret"), ("nobody", "warm-secret-key")])
def test_wrong_credentials(s3_server: S3Server, tmp_path: Path, pair: tuple[str, str]) -> None:
    with credentials(*pair):
        store = _s3(s3_server.endpoint)
        with pytest.raises(AccessDenied) as refused:
            store.upload(log_file(tmp_path), Info(), time.time())
        with pytest.raises(AccessDenied):
            store.find()
    assert pair[1] not in str(refused.value)


def test_no_credentials_at_all(s3_server: S3Server) -> None:
    with credentials():
        del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        with pytest.raises(AccessDenied, match="no credentials"):
            _s3(s3_server.endpoint).find()


def test_a_server_that_hangs_costs_its_time_limit(s3_server: S3Server) -> None:
    with TcpProxy(s3_server.port) as proxy:
        store = _s3(f"http://{proxy.address}", timeout_s=0.5)
        assert store.find() == []
        proxy.black_hole()
        began = time.monotonic()
        with pytest.raises(Unreachable):
            store.find()
        assert time.monotonic() - began < 10


class _Busy(http.server.BaseHTTPRequestHandler):
    """Says 503 to every request."""

    protocol_version = "HTTP/1.1"
    answered = 0

    def _answer(self) -> None:
        type(self).answered += 1
        body = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        self.send_response(503)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def test_a_server_that_says_503_is_asked_again_and_then_told() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with credentials():
            store = _s3(f"http://127.0.0.1:{server.server_port}", attempts=3)
            with pytest.raises(Unreachable, match="after 3 attempts"):
                store.find()
        assert _Busy.answered == 3
    finally:
        server.shutdown()
        server.server_close()


def test_an_outage_delays_the_upload(s3_server: S3Server, tmp_path: Path) -> None:
    with TcpProxy(s3_server.port) as proxy:
        store = _s3(f"http://{proxy.address}", timeout_s=0.5, attempts=1)
        proxy.refuse()
        log_file(tmp_path / "log", "1")
        uploader = Uploader(tmp_path / "log", store, _inspect, retention_s=3600, poll_s=0.05)
        uploader.start()
        wait_until(lambda: uploader.state.failed > 0)
        assert "does not answer" in uploader.state.problem
        assert uploader.state.pending == 1
        proxy.forward()
        wait_until(lambda: uploader.state.uploaded == 1, 20)
        assert uploader.state.problem == ""
        assert uploader.stop(5)
        assert len(store.find()) == 1


def test_credentials_that_expire_in_mid_upload(s3_server: S3Server, tmp_path: Path) -> None:
    """Parts go up with the old ones; the rest is refused, nothing is seen, and it comes later."""
    path = log_file(tmp_path / "log", "1", size=24 << 20)
    store = _s3(s3_server.endpoint, part_bytes=5 << 20, attempts=1)
    backend = store._backend  # to let its credentials expire under it
    client = backend._client  # type: ignore[attr-defined]
    parts: list[str] = []

    def expire(model: object, **_: object) -> None:
        parts.append(model.name)  # type: ignore[attr-defined]
        if parts.count("UploadPart") == 2:
            client._request_signer._credentials.secret_key = "expired"

    client.meta.events.register("before-call.s3", expire)
    with pytest.raises(AccessDenied):
        store.upload(path, Info(), time.time())
    assert "CompleteMultipartUpload" not in parts
    again = SnapshotStore(
        open_backend(backend.url, BackendOptions(endpoint=s3_server.endpoint)), "pins", "separate"
    )
    assert again.find() == []
    again.upload(path, Info(), time.time())
    (found,) = again.find()
    assert again.read(found) == path.read_bytes()


_CHILD = """\
import sys, time
from pathlib import Path
from tests.integration.test_snapshots import Info
from warmup.backend import BackendOptions, open_backend
from warmup.snapshots import SnapshotStore

folder, url, endpoint = sys.argv[1:]
options = BackendOptions(endpoint=endpoint or None, part_bytes=5 << 20)
store = SnapshotStore(open_backend(url, options), "pins", "separate")
print("begins", flush=True)
store.upload(next(Path(folder).glob("*.fcrl")), Info(), time.time())
print("done", flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.08, 0.2])
def test_a_killed_upload_leaves_nothing_half(
    url: str,
    store: SnapshotStore,
    start_uploader: Callable[..., Uploader],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    delay_s: float,
) -> None:
    path = log_file(tmp_path / "log", size=40 << 20)
    data = path.read_bytes()
    endpoint = request.getfixturevalue("s3_server").endpoint if url.startswith("s3") else ""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "log"), url, endpoint],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "begins\n"
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    for found in store.find():  # it was quick: then all of it is there
        assert store.read(found) == data
    uploader = start_uploader()  # the next start
    wait_until(lambda: uploader.state.uploaded == 1, 30)
    (found,) = store.find()
    assert store.read(found) == data
    assert not path.exists()
