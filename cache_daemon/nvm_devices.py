"""The NVM devices as their node's counters tell of them, and a watch that logs what changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from cache_daemon.config_units import format_size
from cache_daemon.metrics import SampleLike, SampleSource

__all__ = ["DeviceWatch", "NvmDevice", "nvm_devices"]

_log = logging.getLogger(__name__)

_POLL_S = 1.0
_JOIN_S = 2.0
_PREFIX = "feature_cache_nvm_device_"
_YES = "true"
_SET_ASIDE = "set aside"  # how `content` begins when something was there that is not used


@dataclass(frozen=True)
class NvmDevice:
    """One file or block device, at the moment of asking."""

    path: str
    size_bytes: int = 0
    in_service: bool = True
    io: str = ""  # io_uring or threads
    direct: bool = False
    fallback: str = ""  # why it is not what the config asks for; "": it is
    content: str = ""  # what it held at the start, and what became of that


def nvm_devices(samples: Iterable[SampleLike]) -> list[NvmDevice]:
    """The devices in the order in which the node shows them; none without an NVM tier."""
    info: dict[str, SampleLike] = {}
    values: dict[tuple[str, str], float] = {}
    for sample in samples:
        if not sample.name.startswith(_PREFIX):
            continue
        name, path = sample.name.removeprefix(_PREFIX), sample.labels["device"]
        if name == "info":
            info[path] = sample
        else:
            values[name, path] = sample.value
    return [
        NvmDevice(
            path=path,
            size_bytes=int(values.get(("bytes", path), 0)),
            in_service=values.get(("in_service", path), 1.0) > 0,
            io=sample.labels.get("io", ""),
            direct=sample.labels.get("direct", "") == _YES,
            fallback=sample.labels.get("fallback", ""),
            content=sample.labels.get("content", ""),
        )
        for path, sample in info.items()
    ]


class DeviceWatch:
    """Says in the log what each device got, and when one leaves service or comes back.

    Runs from construction until `stop`, in a thread of its own, which is not started where there
    are no devices. Thread-safe.
    """

    def __init__(self, source: SampleSource, poll_s: float = _POLL_S) -> None:
        self._source = source
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._out: frozenset[str] = frozenset()  # replaced as a whole
        self._thread: threading.Thread | None = None
        devices = nvm_devices(source.samples())
        for device in devices:
            _announce(device)
        self._compare(devices)
        if devices:
            self._thread = threading.Thread(target=self._run, name="nvm-watch", daemon=True)
            self._thread.start()

    @property
    def out_of_service(self) -> list[str]:
        """Paths of the devices that are out of service, as of the last look."""
        return sorted(self._out)

    def stop(self) -> None:
        """Ends the watch. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_s):
            self._look()

    def _look(self) -> None:
        try:
            self._compare(nvm_devices(self._source.samples()))
        except Exception:
            _log.exception("nvm: the devices cannot be watched")

    def _compare(self, devices: list[NvmDevice]) -> None:
        before, self._out = self._out, frozenset(d.path for d in devices if not d.in_service)
        for path in sorted(self._out - before):
            _log.warning(
                "nvm: %s is out of service after too many errors: what lay on it is lost, DRAM and "
                "the stores go on; it is probed until it works again",
                path,
            )
        for path in sorted(before - self._out):
            _log.warning("nvm: %s is back in service, and empty", path)


def _announce(device: NvmDevice) -> None:
    line = f"nvm: {device.path}: {format_size(device.size_bytes)}: {device.io}, "
    line += "direct" if device.direct else "buffered"
    if device.content:
        line += f"; {device.content}"
    if device.fallback:
        line += f"; not what was asked for: {device.fallback}"
    expected = not device.fallback and not device.content.startswith(_SET_ASIDE)
    _log.log(logging.INFO if expected else logging.WARNING, "%s", line)
