"""The servers that other tests rely on do what their fixtures say."""

from collections.abc import Callable
from pathlib import Path

import pytest
from kazoo.exceptions import KazooException
from kazoo.handlers.threading import KazooTimeoutError

from tests.servers import wait_until
from tests.zookeeper import (
    ZooKeeperEnsemble,
    ZooKeeperServer,
    client_of,
    end_session,
    new_chroot,
)


def test_each_test_gets_a_chroot_of_its_own(zookeeper_hosts: str) -> None:
    with client_of(zookeeper_hosts) as client:
        assert client.get_children("/") == []
        client.create("/x", b"1")
        assert client.get("/x")[0] == b"1"


def test_data_outlives_a_kill(start_zookeeper: Callable[..., ZooKeeperServer]) -> None:
    server = start_zookeeper()
    with server.client() as client:
        client.create("/kept", b"1")
    server.kill()
    assert not server.is_ready()
    server.start()
    with server.client() as client:
        assert client.get("/kept")[0] == b"1"
    assert server.state() == "standalone"


def test_a_session_ends_when_another_closes_it(zookeeper_hosts: str) -> None:
    with client_of(zookeeper_hosts) as watcher, client_of(zookeeper_hosts) as owner:
        owner.create("/mine", ephemeral=True)
        end_session(zookeeper_hosts, owner.client_id)
        wait_until(lambda: watcher.exists("/mine") is None, 5, "the ephemeral znode to go")


def test_sasl_lets_in_who_knows_the_password(
    start_zookeeper: Callable[..., ZooKeeperServer],
) -> None:
    server = start_zookeeper(sasl_users={"leaf": "right"})
    options = {"mechanism": "DIGEST-MD5", "username": "leaf", "password": "right"}
    with server.client(sasl_options=options) as client:
        client.create("/x")
        assert "x" in client.get_children("/")


def test_sasl_gives_nobody_else_an_answer(
    start_zookeeper: Callable[..., ZooKeeperServer],
) -> None:
    server = start_zookeeper(sasl_users={"leaf": "right"})
    with pytest.raises((KazooException, KazooTimeoutError)), server.client() as client:
        client.create("/y")


def test_an_ensemble_survives_its_leader_and_is_repaired(
    zookeeper_ensemble: ZooKeeperEnsemble,
) -> None:
    leader = zookeeper_ensemble.leader()
    assert len(zookeeper_ensemble.followers()) == 2
    with client_of(new_chroot(zookeeper_ensemble.hosts)) as client:
        client.create("/x", b"1")
        leader.kill()
        assert client.retry(client.get, "/x")[0] == b"1"
        assert zookeeper_ensemble.leader() is not leader
    zookeeper_ensemble.followers()[0].pause()
    zookeeper_ensemble.repair()
    assert len(zookeeper_ensemble.followers()) == 2


def test_a_missing_jar_names_the_package(
    monkeypatch: pytest.MonkeyPatch, start_zookeeper: Callable[..., ZooKeeperServer]
) -> None:
    monkeypatch.setattr(ZooKeeperServer, "program", "no-such-java")
    with pytest.raises(AssertionError, match="default-jre-headless"):
        start_zookeeper()
    monkeypatch.undo()
    monkeypatch.setattr("tests.zookeeper._JARS", (Path("/nowhere/zookeeper.jar"),))
    with pytest.raises(AssertionError, match="install Debian's zookeeper"):
        start_zookeeper()
