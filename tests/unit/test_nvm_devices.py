"""Devices as the counters tell of them, and what the watch says when one fails or comes back."""

import logging
import threading
from dataclasses import dataclass, field

import pytest

from cache_daemon.metrics import HistogramLike
from cache_daemon.nvm_devices import DeviceWatch, NvmDevice, nvm_devices
from tests.servers import wait_until


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float
    kind: str = "gauge"
    help: str = "What it counts."


@dataclass
class Node:
    """A node with two devices, of which the second got less than what was asked for."""

    in_service: dict[str, float] = field(default_factory=lambda: {"/nvm/a": 1.0, "/nvm/b": 1.0})
    failure: Exception | None = None
    content: str = "new"
    looks: int = 0

    def samples(self) -> list[Sample]:
        self.looks += 1
        if self.failure is not None:
            raise self.failure
        a = {
            "device": "/nvm/a",
            "io": "io_uring",
            "direct": "true",
            "fallback": "",
            "content": self.content,
        }
        b = {
            "device": "/nvm/b",
            "io": "threads",
            "direct": "false",
            "fallback": "io_uring: Operation not permitted",
        }
        prefix = "feature_cache_nvm_device"
        return [
            Sample("feature_cache_nvm_region_bytes", {}, 65536.0),
            *(Sample(f"{prefix}_info", labels, 1.0) for labels in (a, b) if self.in_service),
            *(
                Sample(f"{prefix}_in_service", {"device": path}, value)
                for path, value in self.in_service.items()
            ),
            *(Sample(f"{prefix}_bytes", {"device": path}, 8 << 20) for path in self.in_service),
            Sample(f"{prefix}_regions", {"device": "/nvm/a", "state": "free"}, 9.0),
        ]

    def histograms(self) -> list[HistogramLike]:
        return []


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_devices_are_read_from_the_counters() -> None:
    assert nvm_devices(Node({"/nvm/a": 1.0, "/nvm/b": 0.0}).samples()) == [
        NvmDevice("/nvm/a", 8 << 20, True, "io_uring", True, "", "new"),
        NvmDevice("/nvm/b", 8 << 20, False, "threads", False, "io_uring: Operation not permitted"),
    ]


def test_a_node_without_nvm_has_no_devices_and_no_thread() -> None:
    node = Node({})
    watch = DeviceWatch(node, poll_s=0.01)
    assert nvm_devices(node.samples()) == []
    assert watch.out_of_service == []
    assert "nvm-watch" not in {thread.name for thread in threading.enumerate()}
    watch.stop()


def test_the_start_says_what_each_device_got(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watch = DeviceWatch(Node(), poll_s=60)
    watch.stop()
    assert lines(caplog, logging.INFO) == [
        "nvm: /nvm/a: 8MiB: io_uring, direct; new",
        "nvm: /nvm/b: 8MiB: threads, buffered; not what was asked for: "
        "io_uring: Operation not permitted",
    ]
    assert len(lines(caplog)) == 1, "only the one that fell back is worth a warning"


def test_what_a_device_held_and_is_not_used_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    DeviceWatch(Node(content="set aside: its superblock is damaged"), poll_s=60).stop()
    assert lines(caplog)[0] == (
        "nvm: /nvm/a: 8MiB: io_uring, direct; set aside: its superblock is damaged"
    )


def test_leaving_and_coming_back_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    node = Node({"/nvm/a": 1.0, "/nvm/b": 1.0})
    watch = DeviceWatch(node, poll_s=0.005)
    caplog.clear()
    try:
        node.in_service["/nvm/b"] = 0.0
        wait_until(lambda: watch.out_of_service == ["/nvm/b"])
        looks = node.looks
        wait_until(lambda: node.looks > looks + 3)
        assert len(lines(caplog)) == 1
        assert "/nvm/b is out of service" in lines(caplog)[0]
        node.in_service["/nvm/b"] = 1.0
        wait_until(lambda: watch.out_of_service == [])
        wait_until(lambda: len(lines(caplog)) == 2)
        assert lines(caplog)[1] == "nvm: /nvm/b is back in service, and empty"
    finally:
        watch.stop()


def test_a_device_that_is_out_from_the_start_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = DeviceWatch(Node({"/nvm/a": 0.0, "/nvm/b": 1.0}), poll_s=60)
    watch.stop()
    assert watch.out_of_service == ["/nvm/a"]
    assert any("/nvm/a is out of service" in line for line in lines(caplog))


def test_a_look_that_fails_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    watch = DeviceWatch(node, poll_s=0.005)
    try:
        node.failure = RuntimeError("the node is gone")
        wait_until(lambda: "nvm: the devices cannot be watched" in lines(caplog))
        node.failure = None
        node.in_service["/nvm/a"] = 0.0
        wait_until(lambda: watch.out_of_service == ["/nvm/a"])
    finally:
        watch.stop()


def test_a_stop_ends_the_thread_at_once() -> None:
    watch = DeviceWatch(Node(), poll_s=60)
    assert "nvm-watch" in {thread.name for thread in threading.enumerate()}
    watch.stop()
    watch.stop()
    assert "nvm-watch" not in {thread.name for thread in threading.enumerate()}
