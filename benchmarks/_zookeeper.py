"""Real ZooKeeper servers for benchmarks and the demo: one alone or an ensemble, on loopback."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Ensemble", "zookeeper"]

_JARS = ("/usr/share/java/zookeeper.jar", "/usr/share/java/slf4j-simple.jar")
_TICK_MS = 200  # sessions last from 2 to 20 of them
_START_S = 30.0
_MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"


class Ensemble:
    """ZooKeeper servers that can be killed and started again, each by its number from 0."""

    def __init__(self, directory: Path, count: int) -> None:
        """Writes their configs below `directory`. RuntimeError where ZooKeeper is not installed."""
        if shutil.which("java") is None or not Path(_JARS[0]).exists():
            raise RuntimeError("ZooKeeper and Java are not installed; `make setup` does it")
        self._folders = [directory / f"zookeeper-{number}" for number in range(count)]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count
        ports = _free_ports(3 * count)
        self._ports = ports[:count]
        peers = [
            f"server.{number + 1}=127.0.0.1:{ports[count + number]}:{ports[2 * count + number]}"
            for number in range(count)
        ]
        for number, folder in enumerate(self._folders):
            (folder / "data").mkdir(parents=True)
            (folder / "data" / "myid").write_text(f"{number + 1}\n")
            lines = [
                f"tickTime={_TICK_MS}",
                f"dataDir={folder}/data",
                f"clientPort={self._ports[number]}",
                "clientPortAddress=127.0.0.1",
                "maxClientCnxns=0",
                *(("initLimit=10", "syncLimit=4", *peers) if count > 1 else ()),
            ]
            (folder / "zoo.cfg").write_text("\n".join(lines) + "\n")

    @property
    def hosts(self) -> str:
        """For a connection string, without a chroot."""
        return ",".join(f"127.0.0.1:{port}" for port in self._ports)

    @property
    def running(self) -> list[int]:
        """Numbers of the servers whose process is there."""
        return [number for number, process in enumerate(self._processes) if process is not None]

    def start(self, *numbers: int) -> None:
        """Starts the named servers, all by default, and waits until each serves clients."""
        chosen = numbers or range(len(self._processes))
        for number in chosen:
            if self._processes[number] is None:
                self._processes[number] = self._spawn(number)
        deadline = time.monotonic() + _START_S
        for number in chosen:
            while not self.state(number):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"ZooKeeper does not serve:\n{self._log_end(number)}")
                time.sleep(0.02)

    def kill(self, *numbers: int) -> None:
        """SIGKILL to the named servers, to all by default."""
        for number in numbers or range(len(self._processes)):
            process, self._processes[number] = self._processes[number], None
            if process is not None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def leader(self) -> int:
        """Who leads the ensemble, or the only server. RuntimeError while nobody does."""
        for number in self.running:
            if self.state(number) in ("leader", "standalone"):
                return number
        raise RuntimeError("no server of ZooKeeper leads")

    def state(self, number: int) -> str:
        """What the server says it is: leader, follower, standalone; "" while it does not serve."""
        for line in self._ask(number, b"mntr").splitlines():
            if line.startswith("zk_server_state"):
                return line.split()[1]
        return ""

    def _ask(self, number: int, word: bytes) -> str:
        address = ("127.0.0.1", self._ports[number])
        with (
            contextlib.suppress(OSError),
            socket.create_connection(address, timeout=0.15) as connection,
        ):
            connection.sendall(word)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts).decode(errors="replace")
        return ""

    def _spawn(self, number: int) -> "subprocess.Popen[bytes]":
        folder = self._folders[number]
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [
                    *("java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
                    "-Dzookeeper.admin.enableServer=false",
                    "-Dzookeeper.4lw.commands.whitelist=*",
                    *("-cp", ":".join(_JARS), _MAIN, str(folder / "zoo.cfg")),
                ],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log_end(self, number: int) -> str:
        lines = (self._folders[number] / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-20:])


@contextmanager
def zookeeper(directory: Path, count: int = 1) -> Iterator[Ensemble]:
    """`count` servers (1 or 3), started; they do not outlive the block."""
    ensemble = Ensemble(directory, count)
    try:
        ensemble.start()
        yield ensemble
    finally:
        ensemble.kill()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
