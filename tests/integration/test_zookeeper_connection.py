"""The connection to real ZooKeepers: sessions, faults, passwords, and what never shows."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sharding.connection import (
    Check,
    Connection,
    Create,
    Credentials,
    Delete,
    Set,
    State,
    ZooKeeperConfig,
)
from sharding.errors import AuthenticationFailed, Conflict, Disconnected
from tests.proxy import TcpProxy
from tests.servers import free_port, wait_until
from tests.zookeeper import (
    ZooKeeperEnsemble,
    ZooKeeperServer,
    client_of,
    end_session,
    new_chroot,
)

SECRET = "open-sesame-4711"


class Recorder:
    """States as they were told."""

    def __init__(self, connection: Connection) -> None:
        self.states: list[State] = []
        connection.on_state(self.states.append)


@contextmanager
def connection_to(hosts: str, timeout_s: float = 2.0, **options: Any) -> Iterator[Connection]:
    made = Connection(ZooKeeperConfig(hosts, timeout_s, **options))
    made.start()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def connected_to(hosts: str, timeout_s: float = 2.0, **options: Any) -> Iterator[Connection]:
    with connection_to(hosts, timeout_s, **options) as made:
        assert made.wait_connected(15), made.problem
        yield made


# ---- reads and writes ----------------------------------------------------------------------------


def test_reads_and_writes(zookeeper_hosts: str) -> None:
    with connected_to(zookeeper_hosts) as one:
        assert one.get("/a/b") is None
        assert one.children("/a") is None
        assert one.create("/a/b", b"1") == "/a/b"
        with pytest.raises(Conflict, match=r"/a/b: is there already"):
            one.create("/a/b")
        found = one.get("/a/b")
        assert found is not None
        assert (found.data, found.version, found.owner) == (b"1", 0, 0)
        assert one.set("/a/b", b"2", version=0) == 1
        with pytest.raises(Conflict, match="was changed by another"):
            one.set("/a/b", b"3", version=0)
        one.put("/a/c", b"x")
        one.put("/a/c", b"y")
        assert one.children("/a") == ["b", "c"]
        assert [z and z.data for z in one.get_many(["/a/c", "/a/none", "/a/b"])] == [
            b"y",
            None,
            b"2",
        ]
        with pytest.raises(Conflict, match="has children"):
            one.delete("/a")
        assert one.delete("/a/c")
        assert not one.delete("/a/c")
        assert one.create("/q/n-", sequence=True) == "/q/n-0000000000"
        own = one.create("/own", ephemeral=True)
        found = one.get(own)
        assert found is not None
        assert found.owner == one.session_id
        one.sync("/")


def test_a_transaction_is_all_or_nothing(zookeeper_hosts: str) -> None:
    with connected_to(zookeeper_hosts) as one:
        one.create("/epoch", b"1")
        one.commit([Check("/epoch", 0), Create("/x", b"1"), Create("/y", b"1")])
        one.set("/epoch", b"2")
        with pytest.raises(Conflict, match="/epoch: was changed by another"):
            one.commit([Set("/x", b"2"), Check("/epoch", 0), Delete("/y")])
        with pytest.raises(Conflict, match="/gone: is not there"):
            one.commit([Set("/x", b"2"), Set("/gone", b"2")])
        with pytest.raises(Conflict, match="/y: is there already"):
            one.commit([Set("/x", b"2"), Create("/y", b"2")])
        assert [z and z.data for z in one.get_many(["/x", "/y"])] == [b"1", b"1"]
        one.commit([])


def test_watches_fire_once_for_one_callback(zookeeper_hosts: str) -> None:
    fired: list[str] = []

    def data() -> None:
        fired.append("data")

    with connected_to(zookeeper_hosts) as one, connected_to(zookeeper_hosts) as other:
        for _ in range(3):
            assert one.get("/x", data) is None
        other.create("/x", b"1")
        wait_until(lambda: fired == ["data"], what="the znode to be seen")
        found = one.get("/x", data)
        assert found is not None
        assert one.children("/x", lambda: fired.append("children")) == []
        other.create("/x/y")
        wait_until(lambda: fired == ["data", "children"])
        other.set("/x", b"2")
        wait_until(lambda: fired == ["data", "children", "data"])


# ---- sessions ------------------------------------------------------------------------------------


def test_a_connection_starts_while_zookeeper_is_away(
    start_zookeeper: Callable[..., ZooKeeperServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = start_zookeeper()
    server.stop()
    with connection_to(server.address) as one:
        assert one.session_age() is None
        with pytest.raises(Disconnected, match="nobody has answered"):
            one.get("/x")
        wait_until(lambda: "no connection to ZooKeeper" in caplog.text, 5)
        server.start()
        assert one.wait_connected(15)
        assert one.problem is None
        one.create("/x")
    assert caplog.text.count("no connection to ZooKeeper") == 1


def test_the_age_of_the_session_rests_on_answers(zookeeper_hosts: str) -> None:
    with connected_to(zookeeper_hosts, timeout_s=1.0) as one:
        assert one.session_timeout_s == pytest.approx(1.0, abs=0.01)
        ages = []
        for _ in range(100):
            age = one.session_age()
            assert age is not None
            ages.append(age)
            time.sleep(0.02)
        assert max(ages) < 0.8, "a third of the timeout, and a busy machine"
        assert one.sessions == 1


def test_a_granted_timeout_is_the_servers(zookeeper_hosts: str) -> None:
    with connected_to(zookeeper_hosts, timeout_s=0.2) as one:
        assert one.session_timeout_s == pytest.approx(0.4, abs=0.01), "two ticks are the least"


def test_a_session_that_ends_is_told_and_made_again(zookeeper_hosts: str) -> None:
    with connected_to(zookeeper_hosts) as one, client_of(zookeeper_hosts) as other:
        recorder = Recorder(one)
        one.create("/mine", ephemeral=True)
        client = one._client
        assert client is not None
        end_session(zookeeper_hosts, client.client_id)
        wait_until(lambda: one.sessions == 2 and one.connected, 10)
        assert State.LOST in recorder.states
        assert recorder.states[-1] is State.CONNECTED
        assert other.exists("/mine") is None


@pytest.mark.parametrize("way", ["black_hole", "refuse"])
def test_a_partition_is_lost_by_our_own_timer(
    zookeeper_hosts: str, start_proxy: Callable[[int], TcpProxy], way: str
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    with connected_to(f"{proxy.address}/{chroot}", timeout_s=1.0) as one:
        recorder = Recorder(one)
        one.create("/mine", ephemeral=True)
        getattr(proxy, way)()
        parted = time.monotonic()
        wait_until(lambda: State.LOST in recorder.states, 5)
        assert 0.5 < time.monotonic() - parted < 2.0
        age = one.session_age()
        assert age is not None
        assert age >= 1.0
        with pytest.raises(Disconnected):
            one.get("/mine")
        with client_of(zookeeper_hosts) as other:
            wait_until(lambda: other.exists("/mine") is None, 5)
        proxy.forward()
        wait_until(lambda: one.connected, 10)
        assert one.sessions == 2
        assert one.get("/mine") is None


def test_a_short_reset_keeps_the_session(
    zookeeper_hosts: str, start_proxy: Callable[[int], TcpProxy]
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    with connected_to(f"{proxy.address}/{chroot}", timeout_s=4.0) as one:
        recorder = Recorder(one)
        one.create("/mine", ephemeral=True)
        proxy.reset()
        wait_until(lambda: one.connected and proxy.accepted >= 2, 10)
        assert State.LOST not in recorder.states
        assert one.sessions == 1
        assert one.get("/mine") is not None


def test_an_ensemble_whose_leader_is_killed(zookeeper_ensemble: ZooKeeperEnsemble) -> None:
    with connected_to(new_chroot(zookeeper_ensemble.hosts), timeout_s=6.0) as one:
        recorder = Recorder(one)
        one.create("/mine", ephemeral=True)
        zookeeper_ensemble.leader().kill()

        def answers() -> bool:
            try:
                return one.get("/mine") is not None
            except Disconnected:
                return False

        time.sleep(0.3)
        wait_until(answers, 15, "an answer of the two that are left")
        assert one.sessions == 1
        assert State.LOST not in recorder.states


def test_a_silent_member_does_not_cost_the_session(
    zookeeper_ensemble: ZooKeeperEnsemble, start_proxy: Callable[[int], TcpProxy]
) -> None:
    silent = start_proxy(free_port())
    silent.black_hole()
    hosts = f"{silent.address},{zookeeper_ensemble.members[0].address}"
    for _ in range(3):  # in either order
        with connected_to(hosts, timeout_s=3.0) as one:
            assert one.exists("/") is not None


def test_a_whole_ensemble_that_goes_and_comes_back(zookeeper_ensemble: ZooKeeperEnsemble) -> None:
    with connected_to(new_chroot(zookeeper_ensemble.hosts), timeout_s=2.0) as one:
        recorder = Recorder(one)
        one.create("/kept", b"1")
        zookeeper_ensemble.kill()
        wait_until(lambda: State.LOST in recorder.states, 6)
        time.sleep(8)
        age = one.session_age()
        assert age is not None
        assert age > 8
        assert "no answer from" in (one.problem or "")
        zookeeper_ensemble.start()
        wait_until(lambda: one.connected, 20)
        found = one.get("/kept")
        assert found is not None


_PROCESS = """
import sys, time
from sharding.connection import Connection, ZooKeeperConfig
one = Connection(ZooKeeperConfig(sys.argv[1], 1.0))
one.on_state(lambda state: print(state.value, flush=True))
one.start()
assert one.wait_connected(15)
one.create("/mine", ephemeral=True)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_that_was_stopped_learns_that_its_session_is_over(zookeeper_hosts: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROCESS, zookeeper_hosts], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["connected", "ready"]
        with client_of(zookeeper_hosts) as other:
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: other.exists("/mine") is None, 10)
            os.kill(process.pid, signal.SIGCONT)
        seen: list[str] = []
        while not seen or seen[-1] != "connected":
            seen.append(process.stdout.readline().strip())
        assert "lost" in seen
    finally:
        process.kill()
        process.wait(10)


def test_close_takes_ephemeral_znodes_away_at_once(zookeeper_hosts: str) -> None:
    with client_of(zookeeper_hosts) as other:
        with connected_to(zookeeper_hosts, timeout_s=10.0) as one:
            one.create("/mine", ephemeral=True)
        wait_until(lambda: other.exists("/mine") is None, 1)
        one.close()
        with pytest.raises(Disconnected, match="the connection was closed"):
            one.get("/x")


def test_close_does_not_wait_for_who_is_silent(
    zookeeper_hosts: str, start_proxy: Callable[[int], TcpProxy]
) -> None:
    address, _, chroot = zookeeper_hosts.partition("/")
    proxy = start_proxy(int(address.rpartition(":")[2]))
    with connected_to(f"{proxy.address}/{chroot}", timeout_s=10.0) as one:
        proxy.black_hole()
        started = time.monotonic()
        one.close(timeout_s=0.5)
        assert time.monotonic() - started < 2
        proxy.refuse()


# ---- chroot and passwords ------------------------------------------------------------------------


def test_a_chroot_is_made_when_it_is_first_written_to(zookeeper_hosts: str) -> None:
    server = zookeeper_hosts.partition("/")[0]
    chroot = f"/deep/{time.time_ns()}"
    with connected_to(server + chroot) as one:
        assert one.get("/config") is None
        one.put("/config", b"1")
    with client_of(server) as other:
        assert other.get(f"{chroot}/config")[0] == b"1"


def test_digest_keeps_others_out(zookeeper_hosts: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    own = Credentials("digest", "leaf", SECRET)
    wrong = Credentials("digest", "leaf", "wrong-password-1")
    with connected_to(zookeeper_hosts, credentials=own, acl="creator") as one:
        one.create("/own", b"1")
        one.commit([Create("/both", b"1")])
        with connected_to(zookeeper_hosts, credentials=own) as again:
            found = again.get("/own")
            assert found is not None
        for credentials, whom in ((wrong, "user 'leaf'"), (None, "a client without a user")):
            with connected_to(zookeeper_hosts, credentials=credentials) as other:
                denied = pytest.raises(AuthenticationFailed, match=f"denies {whom} access")
                with denied:
                    other.get("/own")
                with denied:
                    other.set("/own", b"2")
                with denied:
                    other.commit([Set("/both", b"2")])
    assert SECRET not in caplog.text
    assert "wrong-password-1" not in caplog.text


def test_sasl_lets_in_who_knows_the_password(
    start_zookeeper: Callable[..., ZooKeeperServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = start_zookeeper(sasl_users={"leaf": SECRET})
    credentials = Credentials("sasl", "leaf", SECRET)
    with connected_to(server.address, credentials=credentials, acl="creator") as one:
        one.create("/own", b"1")
        # Again after a connection that broke, within the same session.
        server.kill()
        wait_until(lambda: not one.connected, 10)
        server.start()
        wait_until(lambda: one.connected, 15)
        assert one.get("/own") is not None
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("credentials", "why"),
    [
        (Credentials("sasl", "leaf", SECRET), "refused user 'leaf' (SASL); check the password"),
        (Credentials("digest", "leaf", SECRET), "wants SASL, and user 'leaf' is configured as"),
        (None, "wants a user and password, and none is configured"),
    ],
)
def test_who_is_refused_is_told_why_and_tries_again(
    start_zookeeper: Callable[..., ZooKeeperServer],
    caplog: pytest.LogCaptureFixture,
    credentials: Credentials | None,
    why: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    server = start_zookeeper(sasl_users={"leaf": "another"})
    with connection_to(server.address, credentials=credentials) as one:
        recorder = Recorder(one)
        wait_until(lambda: why in (one.problem or ""), 10, "the reason")
        wait_until(lambda: why in caplog.text, 10, "a log line")
        assert recorder.states == [], "it never was connected"
        with pytest.raises(Disconnected) as caught:
            one.get("/x")
        assert why in str(caught.value)
        refused = server.figures()["zk_connection_rejected"], one.problem
        assert SECRET not in f"{caplog.text} {caught.value} {one!r} {one.config!r} {refused}"
    assert caplog.text.count("no connection to ZooKeeper") == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"hosts": ""}, "is not a server"),
        ({"hosts": "a:1,,b:2"}, "is not a server"),
        ({"hosts": "a:99999"}, "is not a server"),
        ({"hosts": "a:1/"}, "is not a chroot"),
        ({"hosts": "a:1//x"}, "is not a chroot"),
        ({"hosts": "a:1/x/../y"}, "is not a chroot"),
        ({"hosts": "a:1", "acl": "creator"}, "acl: creator needs credentials"),
        ({"hosts": "a:1", "session_timeout_seconds": 0.0}, "a session timeout of 0 s"),
    ],
)
def test_a_config_that_cannot_work_is_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ZooKeeperConfig(**arguments)


def test_addresses_that_work() -> None:
    for hosts in ("zk", "zk-1.example:2181,10.0.0.1", "[::1]:2181,zk:1/feature-cache/prod"):
        assert ZooKeeperConfig(hosts).hosts == hosts


def test_credentials_say_what_is_missing() -> None:
    for user, password in (("", "x"), ("a:b", "x"), ("a", "")):
        with pytest.raises(ValueError, match="user"):
            Credentials("digest", user, password)
    assert SECRET not in repr(ZooKeeperConfig("a:1", credentials=Credentials("sasl", "u", SECRET)))
