"""The lives of one cache: start, compare, load, kill; again and again on the same files."""

import random
import secrets
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_daemon.cachectl_admin import AdminClient
from tests.daemon_process import START_S, Daemon
from tests.torture.load import KIB, DomainPlan, Load, NamespacePlan, Room, now_s, read_all
from tests.torture.model import Fault, Model, Rules

__all__ = ["MODES", "Lives", "Mode", "Outcome"]

MIB = 1 << 20
SHARED = Path("/dev/shm")
_CLIENTS = 4
_SEGMENT = 16 * KIB
_LOGS_KEPT = 4
_BOUNDED_S = 0.1  # of `durability: {bounded: 100ms}`


@dataclass(frozen=True)
class Mode:
    """What is killed, and what is asked of it."""

    name: str
    what: str
    memory: str
    rules: Rules
    nvm: bool = False
    clean_share: float = 0.0  # of lives that end with an orderly stop
    reboot_share: float = 0.0  # of ends after which the shared memory is gone, as after a reboot
    durability: str = "drop_nvm"
    on_shutdown: str = "keep"
    room: int = 0  # bytes that a namespace may take without an eviction; 0: it evicts
    resize_to: tuple[float, float] = (0.4, 1.0)
    changes: bool = False  # budgets change, and a namespace comes and goes, between two lives
    persist: bool = True  # without: for the test that a cache that forgets is noticed


MODES = {
    mode.name: mode
    for mode in (
        Mode("ample", "DRAM, never full: nothing acknowledged may be missing", "56MiB", Rules(),
             clean_share=0.1, room=8 * MIB, resize_to=(0.9, 1.0)),
        Mode("evicting", "DRAM, always full; the config changes between lives", "6MiB",
             Rules(may_evict=True), clean_share=0.1, changes=True),
        Mode("nvm", "DRAM and NVM, also stopped in order", "12MiB",
             Rules(may_evict=True, may_return=True), nvm=True, clean_share=0.25),
        Mode("reboot", "NVM alone survives, what was acknowledged is on the device", "12MiB",
             Rules(may_evict=True, may_return=True), nvm=True, clean_share=0.4, reboot_share=0.6,
             durability="sync", on_shutdown="spill"),
        Mode("bounded", "the same; the last 100 ms may be lost", "12MiB",
             Rules(may_evict=True, may_return=True), nvm=True, clean_share=0.2, reboot_share=0.8,
             durability="bounded"),
        Mode("dropped", "the same; NVM starts empty unless the stop was in order", "12MiB",
             Rules(may_evict=True, may_return=True), nvm=True, clean_share=0.3, reboot_share=0.8),
    )
}  # fmt: skip


@dataclass
class Outcome:
    """What the lives of one mode came to."""

    mode: str
    seed: int
    kills: int = 0  # all: under load and before the daemon was ready
    kills_before_ready: int = 0
    clean_stops: int = 0
    reboots: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)  # how each found what it did

    def to_json(self) -> dict[str, Any]:
        plain = vars(self) | {"counts": dict(self.counts), "starts": dict(self.starts)}
        return plain | {"seconds": round(self.seconds, 1)}


class Lives:
    """Runs one mode. `folder` takes config, logs and the NVM file; removed unless there is a fault.

    The same seed gives the same operations and ends, but not the same interleaving.
    """

    def __init__(self, mode: Mode, seed: int, folder: Path | None = None) -> None:
        self.mode = mode
        self.outcome = Outcome(mode.name, seed)
        self.model = Model(mode.rules)
        self._rng = random.Random(f"{seed} {mode.name}")
        self._folder = folder or Path(tempfile.mkdtemp(prefix="fc-torture-"))
        self._name = f"fc-torture-{secrets.token_hex(4)}"
        self._main = {"budget": "40%"}
        self._namespaces = self._plan()
        self._rooms = {plan.name: Room(mode.room) for plan in self._namespaces}
        self._ready_s = 1.0  # how long a start takes, of late
        self._daemon: Daemon | None = None
        self._must_be_empty = False

    def run(self, kills: int, progress: Callable[[Outcome], object] = lambda _: None) -> Outcome:
        """Lives until there were as many kills, and one more to compare. Raises Fault."""
        began = time.monotonic()
        life = 0
        try:
            while self.outcome.kills < kills:
                life += 1
                self._live(life, kills)
                self.outcome.seconds = time.monotonic() - began
                progress(self.outcome)
            self._start(life + 1)
            self._compare()
            self._stop_in_order()
        except BaseException as fault:
            self._end_process()
            fault.args = (f"{fault}\n{self._where()}", *fault.args[1:])
            raise
        self._clean_up()
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    # ---- one life

    def _live(self, life: int, kills: int) -> None:
        while self.outcome.kills < kills - 1 and self._rng.random() < 0.2:
            self._kill_before_ready()
        self._start(life)
        self._compare()
        daemon = self._running()
        load = self._load(life)
        load.start(_CLIENTS)
        # Not the same moment of a life each time: some are killed before they have done much.
        self._sleep_under(load, self._rng.choice((0.05, 0.2, 0.6)) * self._rng.random())
        self._look_for_evictions(load)
        in_order = self._rng.random() < self.mode.clean_share
        killed_at = now_s()
        if in_order:
            self._stop_in_order()
        else:
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            self.outcome.kills += 1
        load.stop()
        self.outcome.counts.update(load.counts)
        if load.faults:
            raise load.faults[0]
        self._end_of_life(in_order, killed_at)

    def _end_of_life(self, in_order: bool, killed_at: float) -> None:
        reboot = self._rng.random() < self.mode.reboot_share
        bounded = reboot and not in_order and self.mode.durability == "bounded"
        lost_s = 2 * _BOUNDED_S  # the window, and a machine that is busy
        self.model.end_life(now_s(), killed_at - lost_s if bounded else float("inf"))
        if reboot:
            self.outcome.reboots += 1
            self._remove_shared()
        self._must_be_empty = reboot and not in_order and self.mode.durability == "drop_nvm"
        for room in self._rooms.values():
            # Segments that were open when it ended are not filled further.
            room.take(64 * _SEGMENT)
        if self.mode.changes:
            self._change_config()

    def _sleep_under(self, load: Load, seconds: float) -> None:
        daemon = self._running()
        until = time.monotonic() + seconds
        while time.monotonic() < until and not load.faults:
            time.sleep(min(0.01, seconds))
        if daemon.process.poll() is not None:
            raise Fault(f"the daemon ended by itself with {daemon.process.returncode}")

    def _kill_before_ready(self) -> None:
        daemon = self._spawn("early")
        time.sleep(self._rng.uniform(0.3, 1.05) * self._ready_s)
        ended = daemon.process.poll()
        if ended is not None:
            raise Fault(f"the daemon ended by itself with {ended}:\n{daemon.log}")
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        self._daemon = None
        self.outcome.kills += 1
        self.outcome.kills_before_ready += 1

    def _start(self, life: int) -> None:
        began = time.monotonic()
        daemon = self._spawn(str(life))
        daemon.wait_until_ready()
        self._ready_s = min(time.monotonic() - began, START_S)
        self._look_at_start()

    def _spawn(self, life: str) -> Daemon:
        (self._folder / "ready.json").unlink(missing_ok=True)
        self._keep_log(life)
        self._daemon = Daemon(self._folder, self._config())
        return self._daemon

    def _keep_log(self, life: str) -> None:
        log = self._folder / "daemon.log"
        if log.exists():
            log.rename(self._folder / f"before-{life}.log")
        logs = sorted(self._folder.glob("before-*.log"), key=lambda path: path.stat().st_mtime)
        for old in logs[:-_LOGS_KEPT]:
            old.unlink()

    def _compare(self) -> None:
        found = self.outcome.counts["found"]
        read_all(self.model, self._namespaces, self._running().tcp, self.outcome.counts)
        found = self.outcome.counts["found"] - found
        if self._must_be_empty and found:
            raise Fault(f"{found} keys are found after a reboot, although NVM is to start empty")
        self._must_be_empty = False

    def _stop_in_order(self) -> None:
        daemon = self._running()
        daemon.signal()
        status = daemon.wait(60)
        if status != 0:
            raise Fault(f"an orderly stop ends with {status}:\n{daemon.log}")
        self._daemon = None
        self.outcome.clean_stops += 1

    # ---- what runs

    def _load(self, life: int) -> Load:
        daemon = self._running()
        with AdminClient(self._admin, 10) as admin:
            budgets = {
                (namespace.name, domain.name): domain.budget_bytes
                for namespace in admin.stats().namespaces
                for domain in namespace.domains
            }
        return Load(
            model=self.model,
            namespaces=self._namespaces,
            rooms=self._rooms,
            segment_bytes=_SEGMENT,
            data_address=daemon.tcp,
            admin_address=self._admin,
            budgets=budgets,
            resize_to=self.mode.resize_to,
            seed=f"{self.outcome.seed} {self.mode.name} {life}",
        )

    def _look_for_evictions(self, load: Load) -> None:
        """Where nothing may be missing nothing may have been evicted, or the test is at fault.

        A flush counts what is put while it goes on as evicted.
        """
        if not self.mode.room or load.flushed:
            return
        with AdminClient(self._admin, 10) as admin:
            stats = admin.stats()
        for namespace in stats.namespaces:
            for domain in namespace.domains:
                if domain.evictions:
                    name = f"{namespace.name}/{domain.name}"
                    raise Fault(f"{name} evicted {domain.evictions} items: it has too little room")

    def _look_at_start(self) -> None:
        """How the start found the memory and NVM; a fault when it gave up what it could have."""
        with AdminClient(self._admin, 10) as admin:
            start = admin.status().start
        self.outcome.starts[
            f"{start.memory}, nvm {start.nvm}" if self.mode.nvm else start.memory
        ] += 1
        if start.memory == "cold":
            raise Fault(f"the memory is not adopted: {start.memory_reason}")

    @property
    def _admin(self) -> str:
        return f"unix:{self._folder}/admin.sock"

    def _running(self) -> Daemon:
        assert self._daemon is not None, "no daemon runs"
        return self._daemon

    # ---- config

    def _plan(self) -> list[NamespacePlan]:
        # What is written lives in some 1.5 MiB: far less than there is, or more.
        scale = 48 if self.mode.room else 1
        pin = {
            "main": DomainPlan(448 * scale),
            "brief": DomainPlan(192 * scale, ttl_s=1.5),
        }
        user = {"main": DomainPlan(256 * scale, policy="lru")}
        plans = [
            NamespacePlan("pin", 1500, pin, "main"),
            NamespacePlan("user", 500, user, "main"),
        ]
        if self.mode.changes:
            extra = {"main": DomainPlan(256, policy="fifo")}
            plans.append(NamespacePlan("extra", 200, extra, "main"))
        return plans

    def _change_config(self) -> None:
        """Other budgets, and sometimes without a namespace; back again it starts empty."""
        plans = [plan for plan in self._plan() if plan.name != "extra" or self._rng.random() < 0.8]
        gone = {plan.name for plan in self._plan()} - {plan.name for plan in plans}
        for name in gone:
            write = self.model.begin_flush(name, now_s())
            self.model.acknowledge([write], now_s())
        shares = [self._rng.choice((1, 2)) for _ in plans]
        self._namespaces = [
            NamespacePlan(
                plan.name,
                plan.keys,
                {
                    name: DomainPlan(domain.budget_kib // share, domain.policy, domain.ttl_s)
                    for name, domain in plan.domains.items()
                },
                plan.default,
            )
            for plan, share in zip(plans, shares, strict=True)
        ]

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "listen": {"grpc": ["127.0.0.1:0"], "admin": self._admin},
            "memory": {"size": self.mode.memory, "segment_size": _SEGMENT},
            "namespaces": {
                plan.name: {
                    "default_domain": plan.default,
                    "domains": {
                        name: {"budget": domain.budget_kib * KIB, "policy": domain.policy}
                        | ({"ttl": f"{domain.ttl_s * 1000:.0f}ms"} if domain.ttl_s else {})
                        for name, domain in plan.domains.items()
                    },
                }
                for plan in self._namespaces
            },
            "drain_timeout": "10s",
        }
        if self.mode.nvm:
            config["nvm"] = {
                "devices": [{"path": str(self._folder / "nvm"), "size": 8 * MIB}],
                "region_size": "64KiB",
                "read_memory": "4MiB",
                "write_buffers": 8,
            }
            for name, share in (("pin", "60%"), ("user", "30%")):
                config["namespaces"][name]["nvm"] = {"budget": share}
        if self.mode.persist:
            durability: Any = self.mode.durability
            config["persist"] = {
                "dir": str(SHARED),
                "name": self._name,
                "on_shutdown": self.mode.on_shutdown,
                "durability": {"bounded": "100ms"} if durability == "bounded" else durability,
            }
        return config

    # ---- the end

    def _remove_shared(self) -> None:
        for path in SHARED.glob(f"{self._name}*"):
            path.unlink(missing_ok=True)

    def _end_process(self) -> None:
        if self._daemon is not None:
            self._daemon.process.kill()
            self._daemon.process.wait()

    def _clean_up(self) -> None:
        self._end_process()
        self._remove_shared()
        shutil.rmtree(self._folder, ignore_errors=True)

    def discard(self) -> None:
        """Removes what a fault left behind to be looked at."""
        self._clean_up()

    def _where(self) -> str:
        outcome = self.outcome
        return (
            f"mode {outcome.mode}, seed {outcome.seed}, after {outcome.kills} kills, "
            f"{outcome.clean_stops} orderly stops and {outcome.reboots} reboots; "
            f"logs in {self._folder}, memory in {SHARED / self._name}*"
        )


def modes_named(names: Sequence[str]) -> list[Mode]:
    """The modes of these names, all without one. Raises KeyError."""
    return [MODES[name] for name in names] if names else list(MODES.values())
