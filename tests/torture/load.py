"""Clients that write and read at random, tell the model, and judge every answer.

A client is a thread with a connection of its own. Several share a namespace's keys, so writes of
one key overlap. They end when the daemon does not answer any more, or when they are told to.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cache_daemon.cachectl_admin import AdminClient, DaemonUnreachable, RequestRefused
from cache_daemon.client import (
    Client,
    FeatureCacheError,
    InvalidRequest,
    RetryPolicy,
    Status,
    Unavailable,
)
from cache_daemon.client import WriteStatus as Wrote
from tests.torture.model import Fault, Model
from tests.torture.values import make_value

__all__ = ["DomainPlan", "Load", "NamespacePlan", "Room", "now_s", "read_all"]

KIB = 1 << 10
_BATCH = 60  # keys of one call at most
_READ_BATCH = 500
_CALL_S = 10.0
_ONCE = RetryPolicy(attempts=1)
_HITS = {int(Status.HIT_DRAM), int(Status.HIT_NVM)}
# A cell that was not looked at for want of room says nothing about the key.
_UNSAID = {int(Status.THROTTLED), int(Status.TIMED_OUT)}


def now_s() -> float:
    """The daemon's clock: it goes on while no daemon runs and while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class DomainPlan:
    """What the config says of a domain."""

    budget_kib: int
    policy: str = "s3fifo"
    ttl_s: float | None = None


@dataclass(frozen=True)
class NamespacePlan:
    """A namespace of the daemon under test and the keys that clients use in it."""

    name: str
    keys: int
    domains: Mapping[str, DomainPlan]
    default: str

    def key(self, number: int) -> bytes:
        """Keys of many lengths, up to the longest that there may be."""
        text = b"%b:%d:" % (self.name.encode(), number)
        length = (len(text), 40, 1024)[0 if number % 5 else 1 + (number % 50 == 0)]
        return text + b"k" * (length - len(text))


@dataclass
class Room:
    """Bytes that a namespace may take before it must be flushed, where nothing may be evicted.

    Overwritten values stay until their segment is compacted, so all that was written counts.
    """

    limit: int  # bytes; 0: it may evict, and is flushed at random only
    taken: int = 0
    _flushes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, items: int) -> bool:
        """False when there is no room for more: nothing was taken."""
        with self._lock:
            if self.limit and self.taken + items > self.limit:
                return False
            self.taken += items
            return True

    def before_flush(self) -> tuple[int, int]:
        """For `after_flush`."""
        with self._lock:
            return self.taken, self._flushes

    def after_flush(self, before: tuple[int, int]) -> None:
        """What was taken before the flush began is free again, unless another freed it."""
        taken, flushes = before
        with self._lock:
            if flushes == self._flushes:
                self._flushes += 1
                self.taken -= taken


@dataclass
class Load:
    """The clients of one life of the daemon. `stop` ends them; `faults` has what they found."""

    model: Model
    namespaces: Sequence[NamespacePlan]
    rooms: Mapping[str, Room]
    segment_bytes: int
    data_address: str
    admin_address: str
    budgets: Mapping[tuple[str, str], int]  # bytes of each domain, as the daemon says
    resize_to: tuple[float, float]  # shares of those between which a resize chooses
    seed: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[BaseException] = field(default_factory=list)
    flushed: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, clients: int) -> None:
        for number in range(clients):
            thread = threading.Thread(target=self._run, args=[f"{self.seed}.{number}"], daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Waits until every client has seen the daemon's end, or has been told to stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_CALL_S * 3)
            if thread.is_alive():
                raise AssertionError("a client hangs in a call")

    def _run(self, seed: str) -> None:
        rng = random.Random(seed)
        counts: Counter[str] = Counter()
        try:
            with (
                Client(self.data_address, timeout=_CALL_S, retry=_ONCE) as client,
                AdminClient(self.admin_address, _CALL_S) as admin,
            ):
                while not self._stop.is_set():
                    self._one(rng, client, admin, counts)
        except (Unavailable, DaemonUnreachable):
            pass  # killed or draining: what was under way stays without an acknowledgement
        except BaseException as fault:
            self.faults.append(fault)
            self._stop.set()
        with self._lock:
            self.counts.update(counts)

    def _one(
        self, rng: random.Random, client: Client, admin: AdminClient, counts: Counter[str]
    ) -> None:
        draw = rng.random()
        try:
            if draw < 0.45:
                self._get(rng, client, counts)
            elif draw < 0.86:
                self._put(rng, client, admin, counts)
            elif draw < 0.97:
                self._delete(rng, client, counts)
            elif draw < 0.99:
                self._resize(rng, admin, counts)
            elif rng.random() < 0.4:
                self.flush(rng.choice(self.namespaces).name, admin, counts)
        except (Unavailable, DaemonUnreachable):
            raise
        except RequestRefused:
            counts["refused flushes"] += 1  # it is stopping
        except FeatureCacheError as error:
            # Without an acknowledgement, so possible to the model: calls that a drain cuts off.
            if isinstance(error, InvalidRequest):
                raise
            counts[f"error {type(error).__name__}"] += 1

    def _keys(self, rng: random.Random) -> dict[str, list[bytes]]:
        """Keys by namespace, the low ones more often; none twice."""
        chosen = {}
        for plan in rng.sample(self.namespaces, 1 if rng.random() < 0.7 else 2):
            numbers = {
                int(plan.keys * rng.random() ** 2) for _ in range(rng.randint(1, _BATCH))
            }  # a set of few numbers: the order is that of the numbers' hashes, the same each time
            chosen[plan.name] = [plan.key(number) for number in numbers]
        return chosen

    def _get(self, rng: random.Random, client: Client, counts: Counter[str]) -> None:
        columns = self._keys(rng)
        begin = now_s()
        reply = client.batch_get(columns, cache_only=True)
        end = now_s()
        for name, keys in columns.items():
            column = reply[name]
            said = [int(status) for status in column.statuses]
            values = column.to_bytes()
            judged = [i for i, status in enumerate(said) if status not in _UNSAID]
            counts["gets"] += len(judged)
            counts["hits"] += sum(status in _HITS for status in said)
            counts["hits of NVM"] += said.count(int(Status.HIT_NVM))
            self.model.check(
                name, [keys[i] for i in judged], [values[i] for i in judged], begin, end
            )

    def _put(
        self, rng: random.Random, client: Client, admin: AdminClient, counts: Counter[str]
    ) -> None:
        columns: dict[str, tuple[list[bytes], list[bytes]]] = {}
        domains: dict[str, str] = {}
        writes = {}
        # One TTL for the whole call, or the domains' own.
        ttl_s = rng.choice((0.3, 1.0, 60.0)) if rng.random() < 0.3 else None
        for name, keys in self._keys(rng).items():
            plan = next(plan for plan in self.namespaces if plan.name == name)
            domain = rng.choice([*plan.domains, plan.default])
            if domain != plan.default or rng.random() < 0.5:
                domains[name] = domain
            sizes = [self._size(rng) for _ in keys]
            if not self._make_room(plan, keys, sizes, admin, counts):
                domains.pop(name, None)
                continue
            effective = ttl_s if ttl_s is not None else plan.domains[domain].ttl_s
            started = self.model.begin_puts(name, keys, sizes, [effective] * len(keys), now_s())
            writes[name] = started
            columns[name] = (
                keys,
                [
                    make_value(key, write.number, size)
                    for key, write, size in zip(keys, started, sizes, strict=True)
                ],
            )
        if not columns:
            return
        reply = client.batch_put(columns, ttl=ttl_s, domains=domains or None)
        end = now_s()
        for name, started in writes.items():
            statuses = reply[name].tolist()
            pairs = list(zip(started, statuses, strict=True))
            stored = [write for write, status in pairs if status == Wrote.STORED]
            rejected = [write for write, status in pairs if status == Wrote.REJECTED]
            self.model.acknowledge(stored, end)
            self.model.reject(rejected, end)
            counts["puts"] += len(stored)
            counts["rejected puts"] += len(rejected)
            counts["unclear puts"] += len(pairs) - len(stored) - len(rejected)

    def _size(self, rng: random.Random) -> int:
        draw = rng.random()
        if draw < 0.05:
            return rng.randint(1, 3)
        if draw < 0.9:
            return rng.randint(1, 600)
        if draw < 0.99:
            return rng.randint(600, 6 * KIB)
        return rng.randint(self.segment_bytes // 2, 4 * self.segment_bytes)

    def _make_room(
        self, plan: NamespacePlan, keys: list[bytes], sizes: list[int], admin: AdminClient,
        counts: Counter[str],
    ) -> bool:  # fmt: skip
        """Whether the namespace takes these without an eviction; flushes it when it is full."""
        wanted = 0
        for key, size in zip(keys, sizes, strict=True):
            item = 16 + len(key) + size
            # A large value takes segments of its own, and may leave a part of the open one empty.
            wanted += item if item < self.segment_bytes // 2 else item + 2 * self.segment_bytes
        if self.rooms[plan.name].take(wanted):
            return True
        self.flush(plan.name, admin, counts)
        return False

    def _delete(self, rng: random.Random, client: Client, counts: Counter[str]) -> None:
        columns = self._keys(rng)
        writes = {
            name: self.model.begin_deletes(name, keys, now_s()) for name, keys in columns.items()
        }
        reply = client.batch_delete(columns)
        end = now_s()
        for name, started in writes.items():
            statuses = reply[name].tolist()
            done = [w for w, s in zip(started, statuses, strict=True) if s == Wrote.STORED]
            self.model.acknowledge(done, end)
            counts["deletes"] += len(done)

    def flush(self, name: str, admin: AdminClient, counts: Counter[str]) -> None:
        """Flushes a namespace. What was written before it began takes no room afterwards."""
        self.flushed = True
        before = self.rooms[name].before_flush()
        write = self.model.begin_flush(name, now_s())
        admin.flush(name)
        self.model.acknowledge([write], now_s())
        self.rooms[name].after_flush(before)
        counts["flushes"] += 1

    def _resize(self, rng: random.Random, admin: AdminClient, counts: Counter[str]) -> None:
        plan = rng.choice(self.namespaces)
        domain = rng.choice(list(plan.domains))
        low, high = self.resize_to
        budget = int(self.budgets[plan.name, domain] * rng.uniform(low, high))
        try:
            admin.resize(plan.name, domain, budget)
            counts["resizes"] += 1
        except RequestRefused:
            counts["refused resizes"] += 1


def read_all(
    model: Model, namespaces: Sequence[NamespacePlan], address: str, counts: Counter[str]
) -> None:
    """Compares every key that was ever written; nobody writes meanwhile. Raises Fault."""
    with Client(address, timeout=_CALL_S, retry=_ONCE) as client:
        for plan in namespaces:
            keys = model.keys(plan.name)
            for first in range(0, len(keys), _READ_BATCH):
                _settle(model, plan.name, keys[first : first + _READ_BATCH], client, counts)
            model.all_settled(plan.name)


def _settle(
    model: Model, name: str, keys: list[bytes], client: Client, counts: Counter[str]
) -> None:
    deadline = now_s() + 30
    while keys:
        begin = now_s()
        column = client.batch_get({name: keys}, cache_only=True)[name]
        end = now_s()
        values = column.to_bytes()
        said = [int(status) for status in column.statuses]
        judged = [i for i, status in enumerate(said) if status not in _UNSAID]
        model.settle(name, [keys[i] for i in judged], [values[i] for i in judged], begin, end)
        counts["compared"] += len(judged)
        counts["found"] += sum(said[i] in _HITS for i in judged)
        counts["found on NVM"] += said.count(int(Status.HIT_NVM))
        keys = [key for key, status in zip(keys, said, strict=True) if status in _UNSAID]
        if keys and now_s() > deadline:
            raise Fault(f"{name}: {len(keys)} keys get no answer, the first is {keys[0]!r}")
