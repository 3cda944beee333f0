"""Real ZooKeepers for tests: one alone, or an ensemble of three.

The JVM is started directly: the scripts of the package fork, and write to the system's log folder.
"""

import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from kazoo.client import KazooClient

from tests.servers import Server, free_port, wait_until

__all__ = ["ZooKeeperEnsemble", "ZooKeeperServer", "client_of", "end_session", "new_chroot"]

_JARS = tuple(Path("/usr/share/java") / name for name in ("zookeeper.jar", "slf4j-simple.jar"))
_PROBE_TIMEOUT_S = 0.15
_TICK_MS = 200  # a session ends within a tick after its timeout


@contextmanager
def client_of(hosts: str, **options: Any) -> Iterator[KazooClient]:
    """A connected client of kazoo's own; `options` are KazooClient's."""
    client = KazooClient(hosts=hosts, **options)
    client.start(timeout=20)
    try:
        yield client
    finally:
        client.stop()
        client.close()


def new_chroot(hosts: str, prefix: str = "test") -> str:
    """`hosts` with a chroot that is new and empty."""
    chroot = f"/{prefix}-{uuid.uuid4().hex[:12]}"
    with client_of(hosts) as client:
        client.create(chroot)
    return hosts + chroot


def end_session(hosts: str, client_id: tuple[int, bytes]) -> None:
    """Ends the session of another client, as ZooKeeper does when it hears nothing from it.

    `client_id` is that client's, as kazoo says it: session id and password. Its owner learns of it
    when it connects again, which is at once: a session that moves to another connection closes the
    old one.
    """
    with client_of(hosts, client_id=client_id):
        pass


class ZooKeeperServer(Server):
    """One process. `start` returns when it serves, which a member of an ensemble does only once
    there is a quorum: start those through `ZooKeeperEnsemble`."""

    program = "java"
    package = "default-jre-headless"
    ready_timeout_s = 30.0

    def __init__(
        self,
        directory: Path,
        *,
        sasl_users: Mapping[str, str] | None = None,
        members: str = "",
        member_id: int = 0,
    ) -> None:
        """`sasl_users`: passwords by name; nobody else gets a session then.

        `members` are the lines `server.N=…` of an ensemble, of which this is `member_id`.
        """
        super().__init__(directory)
        self.log_path = directory / "zookeeper.log"
        self.port = free_port()
        self._sasl_users = sasl_users
        self._members = members
        self._member_id = member_id

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether there is a process, paused or not."""
        return self._process is not None

    def command(self) -> list[str]:
        for jar in _JARS:
            assert jar.exists(), (
                f"{jar} is not there, and this test needs the real ZooKeeper; "
                "install Debian's zookeeper (make setup does)"
            )
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        if self._member_id:
            (data / "myid").write_text(str(self._member_id))
        lines = [
            f"tickTime={_TICK_MS}",
            f"dataDir={data}",
            f"clientPort={self.port}",
            "clientPortAddress=127.0.0.1",
            "maxClientCnxns=0",
            "maxSessionTimeout=60000",
            "initLimit=10",
            "syncLimit=4",
            self._members,
        ]
        properties = [
            "-Dzookeeper.admin.enableServer=false",
            "-Dzookeeper.4lw.commands.whitelist=*",
        ]
        if self._sasl_users is not None:
            jaas = self.directory / "jaas.conf"
            users = "\n".join(
                f'  user_{name}="{password}"' for name, password in self._sasl_users.items()
            )
            jaas.write_text(
                "Server {\n  org.apache.zookeeper.server.auth.DigestLoginModule required\n"
                f"{users};\n}};\n"
            )
            lines += [
                "authProvider.1=org.apache.zookeeper.server.auth.SASLAuthenticationProvider",
                "enforce.auth.enabled=true",
                "enforce.auth.schemes=sasl",
            ]
            properties.append(f"-Djava.security.auth.login.config={jaas}")
        config = self.directory / "zoo.cfg"
        config.write_text("\n".join(lines) + "\n")
        return [
            self.program,
            *("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
            *properties,
            *("-cp", ":".join(str(jar) for jar in _JARS)),
            "org.apache.zookeeper.server.quorum.QuorumPeerMain",
            str(config),
        ]

    def ask(self, word: str) -> str:
        """What it says to a four-letter word; OSError when it says nothing."""
        with socket.create_connection(("127.0.0.1", self.port), _PROBE_TIMEOUT_S) as connection:
            connection.sendall(word.encode())
            answer = bytearray()
            while chunk := connection.recv(1 << 16):
                answer += chunk
        return answer.decode()

    def figures(self) -> dict[str, str]:
        """All that `mntr` says; empty while it does not serve."""
        try:
            lines = self.ask("mntr").splitlines()
        except OSError:
            return {}
        rows = (line.partition("\t") for line in lines)
        return {name: value for name, _, value in rows if value}

    def state(self) -> str:
        """`standalone`, `leader`, `follower`, or nothing while it does not serve."""
        return self.figures().get("zk_server_state", "")

    def is_ready(self) -> bool:
        return self.state() != ""

    @contextmanager
    def client(self, chroot: str = "", **options: Any) -> Iterator[KazooClient]:
        """A client of kazoo's own, to look at what others wrote and to damage it."""
        with client_of(self.address + chroot, **options) as made:
            yield made


class ZooKeeperEnsemble:
    """Three members, of which any two serve; a context manager."""

    def __init__(self, directory: Path, size: int = 3) -> None:
        lines = "\n".join(
            f"server.{n}=127.0.0.1:{free_port()}:{free_port()}" for n in range(1, size + 1)
        )
        self.members: list[ZooKeeperServer] = []
        for number in range(1, size + 1):
            own = directory / f"member-{number}"
            own.mkdir()
            self.members.append(ZooKeeperServer(own, members=lines, member_id=number))

    @property
    def hosts(self) -> str:
        """For a client: `host:port,…`, without a chroot."""
        return ",".join(member.address for member in self.members)

    def leader(self) -> ZooKeeperServer:
        """The member that leads now, waiting for an election to end."""
        found: list[ZooKeeperServer] = []

        def leads() -> bool:
            found[:] = [member for member in self.members if member.state() == "leader"]
            return bool(found)

        wait_until(leads, 20, "a leader of the ensemble")
        return found[0]

    def followers(self) -> list[ZooKeeperServer]:
        return [member for member in self.members if member.state() == "follower"]

    def start(self) -> None:
        """Starts whoever does not run, and waits until all of them serve."""
        self._all(lambda member: member.start(), [m for m in self.members if not m.is_running])

    def repair(self) -> None:
        """Back to three that serve, whatever a test did to them."""
        for member in self.members:
            if member.is_running:
                member.resume()
        self.start()
        wait_until(lambda: all(member.is_ready() for member in self.members), 30, "all members")

    def kill(self) -> None:
        """SIGKILL to every member."""
        for member in self.members:
            member.kill()

    def stop(self) -> None:
        self._all(lambda member: member.stop(), self.members)

    @contextmanager
    def client(self, chroot: str = "", **options: Any) -> Iterator[KazooClient]:
        with client_of(self.hosts + chroot, **options) as made:
            yield made

    def __enter__(self) -> "ZooKeeperEnsemble":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @staticmethod
    def _all(work: Callable[[ZooKeeperServer], None], members: list[ZooKeeperServer]) -> None:
        # At once: none of them is ready before a second one is there.
        with ThreadPoolExecutor(max(1, len(members))) as pool:
            list(pool.map(work, members))
