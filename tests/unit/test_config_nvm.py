"""The NVM tier's settings: what is refused, how regions are shared out, what the engine is told."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_daemon import config_nvm
from cache_daemon.config import Config, ConfigError, effective_settings, parse_config
from cache_daemon.config_check import check
from cache_daemon.config_node import budgets, node_config
from cache_daemon.config_nvm import NvmPlan, block_device_bytes, nvm_plan
from cache_daemon.config_units import Lateness, parse_lateness

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_GOOD = """\
listen: {grpc: [127.0.0.1:0]}
memory: {size: 128MiB}
nvm:
  devices:
    - {path: nvm/one, size: 64MiB}
    - {path: nvm/two, size: 64MiB}
namespaces:
  pin:
    store: features
    nvm: {budget: 60%}
    speculative: {after: p99, budget: 5%}
    domains: {main: {budget: 50%}}
  user:
    nvm: {budget: 8MiB}
    domains: {main: {budget: 20%}}
stores:
  features: {type: lmdb, options: {path: features}}
"""


def _changed(*changes: tuple[str, str]) -> str:
    text = _GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


def _problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml")
    return str(caught.value).splitlines()


def _planned(config: Config, **devices: int) -> NvmPlan:
    plan = nvm_plan(config, devices.get)
    assert plan is not None
    return plan


def test_the_defaults() -> None:
    config = parse_config(_GOOD)
    nvm = config.nvm
    assert nvm is not None
    assert (nvm.region_size, nvm.io, nvm.direct) == (0, "auto", "try")
    assert (nvm.queue_depth, nvm.io_threads, nvm.queued_reads) == (128, 64, 65536)
    assert (nvm.coalesce_gap, nvm.read_memory) == (4 * KIB, 16 * MIB)
    assert (nvm.write_buffers, nvm.write_rate) == (2, 0)
    assert (nvm.errors_max, nvm.probe_interval) == (16, 5.0)
    share = config.namespaces["pin"].nvm
    assert share is not None
    assert (share.admission, share.admission_frequency) == ("all", 2)
    assert share.promotion == "second_hit"
    speculative = config.namespaces["pin"].speculative
    assert speculative is not None
    assert (speculative.after, speculative.budget) == (Lateness(quantile=0.99), 0.05)
    assert config.namespaces["user"].speculative is None


def test_without_the_section_there_is_no_tier() -> None:
    raw = yaml.safe_load(_GOOD)
    del raw["nvm"]
    for namespace in raw["namespaces"].values():
        del namespace["nvm"]
    del raw["namespaces"]["pin"]["speculative"]
    config = parse_config(yaml.safe_dump(raw))
    assert nvm_plan(config) is None
    native = node_config(config)
    assert native.nvm is None
    assert all(namespace.nvm_budget_bytes == 0 for namespace in native.namespaces)
    assert native.nvm_memory_bytes() == 0


_SPECULATIVE = "    speculative: {after: p99, budget: 5%}\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("devices:", "devcies:", "test.yaml:4: nvm.devcies: unknown key; did you mean 'devices'?"),
        (
            "path: nvm/two",
            "pth: nvm/two",
            "test.yaml:6: nvm.devices[1].pth: unknown key; did you mean 'path'?",
        ),
        (
            "path: nvm/two",
            "path: nvm/../nvm/one",
            "test.yaml:6: nvm.devices[1].path: nvm/../nvm/one is nvm.devices[0] already",
        ),
        (
            "{path: nvm/two, size: 64MiB}",
            "{path: nvm/two}",
            "test.yaml:6: nvm.devices[1].size: missing; nvm/two is no block device here, and a "
            "file is made as large as its size says",
        ),
        ("path: nvm/two", "path: ''", "nvm.devices[1].path: string should have at least 1"),
        ("nvm/two, size: 64MiB", "nvm/two, size: 100KiB", "it must be at least 1MiB"),
        ("nvm/two, size: 64MiB", "nvm/two, size: 64Mb", "unknown unit 'Mb'"),
        ("nvm:\n  dev", "nvm:\n  region_size: 100KiB\n  dev", "a power of two from 64KiB to 16MiB"),
        ("nvm:\n  dev", "nvm:\n  region_size: 32MiB\n  dev", "a power of two from 64KiB to 16MiB"),
        ("nvm:\n  dev", "nvm:\n  region_size: 32KiB\n  dev", "a power of two from 64KiB to 16MiB"),
        (
            "nvm:\n  dev",
            "nvm:\n  io: uring\n  dev",
            "'uring' is not known; did you mean 'io_uring'",
        ),
        ("nvm:\n  dev", "nvm:\n  direct: yes\n  dev", "'yes' is not known; known here: off, try"),
        ("nvm:\n  dev", "nvm:\n  queue_depth: 0\n  dev", "it must be at least 1"),
        ("nvm:\n  dev", "nvm:\n  queue_depth: 5000\n  dev", "it must be at most 4096"),
        ("nvm:\n  dev", "nvm:\n  io_threads: 0\n  dev", "it must be at least 1"),
        ("nvm:\n  dev", "nvm:\n  io_threads: 257\n  dev", "it must be at most 256"),
        ("nvm:\n  dev", "nvm:\n  coalesce_gap: 65KiB\n  dev", "it must be at most 64KiB"),
        ("nvm:\n  dev", "nvm:\n  queued_reads: 0\n  dev", "it must be at least 1"),
        ("nvm:\n  dev", "nvm:\n  queued_reads: 4294967296\n  dev", "it must be at most"),
        ("nvm:\n  dev", "nvm:\n  read_memory: 1MiB\n  dev", "it must be at least 4MiB"),
        ("nvm:\n  dev", "nvm:\n  write_buffers: 0\n  dev", "it must be at least 1"),
        ("nvm:\n  dev", "nvm:\n  write_buffers: 65\n  dev", "it must be at most 64"),
        ("nvm:\n  dev", "nvm:\n  write_rate: fast\n  dev", "'fast' is not a size"),
        ("nvm:\n  dev", "nvm:\n  errors_max: 0\n  dev", "it must be at least 1"),
        ("nvm:\n  dev", "nvm:\n  probe_interval: 0\n  dev", "it must be above 0"),
        ("nvm:\n  dev", "nvm:\n  probe_interval: 5\n  dev", "is not a duration"),
        ("budget: 60%", "budget: 0", "namespaces.pin.nvm.budget: a budget must be above 0"),
        ("budget: 60%", "budget: 0%", "namespaces.pin.nvm.budget: a budget must be above 0"),
        ("budget: 60%", "budget: 0.6", "0.6 is not a budget"),
        ("{budget: 60%}", "{}", "namespaces.pin.nvm.budget: missing; it has no default"),
        ("{budget: 60%}", "60%", "namespaces.pin.nvm: a mapping is expected here"),
        (
            "budget: 60%",
            "budget: 60%, admision: all",
            "nvm.admision: unknown key; did you mean 'admission'?",
        ),
        ("budget: 60%", "budget: 60%, admission: some", "'some' is not known"),
        ("budget: 60%", "budget: 60%, admission_frequency: 0", "it must be at least 1"),
        ("budget: 60%", "budget: 60%, admission_frequency: 16", "it must be at most 15"),
        ("budget: 60%", "budget: 60%, promotion: second", "did you mean 'second_hit'?"),
        (
            "budget: 60%",
            "budget: 127.9MiB",
            "test.yaml:7: namespaces: the namespaces' nvm budgets add up to 135.9MiB, more than "
            "the nvm devices hold (127.9MiB)",
        ),
        ("{budget: 8MiB}", "{budget: 41%}", "add up to 101% of the devices; at most 100%"),
        (
            "{budget: 8MiB}",
            "{budget: 60MiB}",
            "add up to 136.7MiB, more than the nvm devices hold (127.9MiB)",
        ),
        (
            "    store: features\n    nvm: {budget: 60%}\n",
            "    store: features\n",
            "test.yaml:10: namespaces.pin.speculative: it is for reads of NVM that are late, and "
            "this namespace has no nvm; give it nvm: {budget: ...}, or remove this",
        ),
        (
            "    store: features\n",
            "",
            "test.yaml:10: namespaces.pin.speculative: speculative without an upstream: there is "
            "nobody to ask; give the namespace a store, or remove this",
        ),
        ("after: p99", "after: p100", "a quantile lies from p50 to below p100"),
        ("after: p99", "after: p49.9", "a quantile lies from p50 to below p100"),
        ("after: p99", "after: soon", "'soon' is no lateness; write a quantile"),
        ("after: p99", "after: 2", "2 is no lateness; write a quantile"),
        ("after: p99", "after: 0us", "it must be above 0 and at most 1m"),
        ("after: p99", "after: 2m", "it must be above 0 and at most 1m"),
        ("budget: 5%", "budget: 0%", "0% is out of range; it must be above 0%"),
        ("budget: 5%", "budget: 101%", "'101%' is not a share"),
        ("budget: 5%", "budgt: 5%", "speculative.budgt: unknown key; did you mean 'budget'?"),
    ],
)
def test_one_slip_gives_one_clear_line(old: str, new: str, expected: str) -> None:
    lines = _problems(_changed((old, new)))
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert lines[0].startswith("test.yaml:")


def test_a_namespace_with_nvm_needs_the_section() -> None:
    raw = yaml.safe_load(_GOOD)
    del raw["nvm"]
    lines = _problems(yaml.safe_dump(raw, sort_keys=False))
    assert [line.partition(": ")[2] for line in lines] == [
        "namespaces.pin.nvm: the config has no nvm section; add one with a device, or remove this",
        "namespaces.user.nvm: the config has no nvm section; add one with a device, or remove this",
    ]
    assert len(_problems(yaml.safe_dump(raw | {"nvm": None}))) == 2


def test_the_section_needs_a_namespace_with_nvm() -> None:
    text = _changed(
        ("    nvm: {budget: 60%}\n", ""), ("    nvm: {budget: 8MiB}\n", ""), (_SPECULATIVE, "")
    )
    (line,) = _problems(text)
    assert line == (
        "test.yaml:3: nvm: no namespace uses it; give one a part of it, such as "
        "nvm: {budget: 50%}, or remove this section"
    )


def test_the_section_needs_a_device() -> None:
    raw = yaml.safe_load(_GOOD)
    raw["nvm"] = {"devices": []}
    assert "nvm.devices: at least one is needed" in "\n".join(_problems(yaml.safe_dump(raw)))
    raw["nvm"] = {}
    assert "nvm.devices: missing" in "\n".join(_problems(yaml.safe_dump(raw)))
    raw["nvm"] = {"devices": [{"path": f"nvm/{n}", "size": "8MiB"} for n in range(17)]}
    assert "nvm.devices" in "\n".join(_problems(yaml.safe_dump(raw)))


def test_all_that_is_wrong_is_told_at_once() -> None:
    text = _changed(
        ("path: nvm/two, size: 64MiB", "path: nvm/one"),
        ("after: p99", "after: never"),
        ("{budget: 8MiB}", "{budget: 50%}"),
    )
    where = [line.split(": ")[1] for line in _problems(text)]
    assert where == [
        "nvm.devices[1].size",
        "nvm.devices[1].path",
        "namespaces",
        "namespaces.pin.speculative.after",
    ]


# ---- regions and budgets -------------------------------------------------------------------------


def test_budgets_are_whole_regions_of_all_devices() -> None:
    plan = _planned(parse_config(_changed(("nvm:\n  dev", "nvm:\n  region_size: 1MiB\n  dev"))))
    assert plan.region_bytes == MIB
    assert plan.regions == 2 * 63  # of each device 64KiB are kept, so one region does not fit
    assert plan.budgets == {"pin": int(0.6 * 126) * MIB, "user": 8 * MIB}


@pytest.mark.parametrize(
    ("size", "budget", "region"),
    [
        ("64MiB", "8MiB", 128 * KIB),  # a 64th
        ("64MiB", "9MiB", 128 * KIB),  # a 64th, rounded down to a power of two
        ("64MiB", "1MiB", 64 * KIB),  # the least
        ("64GiB", "40GiB", 16 * MIB),  # the most
        ("16GiB", "10%", 32 * MIB // 2),
    ],
)
def test_the_region_follows_the_smallest_budget(size: str, budget: str, region: int) -> None:
    plan = _planned(
        parse_config(
            _changed(("size: 64MiB", f"size: {size}"), ("{budget: 8MiB}", f"{{budget: {budget}}}"))
        )
    )
    assert plan.region_bytes == region


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13, 97])
@pytest.mark.parametrize("size", ["5MiB", "64MiB", "1000MB", "33GiB"])
@pytest.mark.parametrize("region", ["auto", "64KiB", "128KiB"])
def test_shares_that_add_up_to_all_fit(count: int, size: str, region: str) -> None:
    raw = yaml.safe_load(_GOOD)
    raw["memory"] = {"size": "16GiB", "expected_item_size": "4KiB"}
    raw["nvm"]["devices"] = [{"path": f"nvm/{n}", "size": size} for n in range(5)]
    raw["nvm"]["region_size"] = region
    names = [f"n{number}" for number in range(count)]
    shares = dict.fromkeys(names, 100 / count)
    raw["namespaces"] = {
        name: {
            "nvm": {"budget": f"{share:.12f}%"},
            "domains": {"main": {"budget": f"{99 / count:.6f}%"}},
        }
        for name, share in shares.items()
    }
    config, problems = check(raw)
    assert (config is not None, problems) == (True, [])
    assert config is not None
    if (count, size, region) == (97, "5MiB", "128KiB"):
        with pytest.raises(ConfigError, match="the least is 4 regions"):
            nvm_plan(config)
        return
    plan = _planned(config)
    total = sum(plan.budgets.values())
    assert total <= plan.regions * plan.region_bytes
    # What is lost is at most a region a namespace.
    assert total > (plan.regions - count) * plan.region_bytes
    node_config(config)  # and the engine agrees


def test_a_share_of_so_many_regions_is_not_one_less() -> None:
    text = _changed(
        ("nvm:\n  dev", "nvm:\n  region_size: 1MiB\n  dev"),
        ("size: 64MiB", "size: 51MiB"),  # 100 regions
        ("{budget: 60%}", "{budget: 29%}"),
        ("{budget: 8MiB}", "{budget: 71%}"),
    )
    plan = _planned(parse_config(text))
    assert plan.regions == 100
    assert plan.budgets == {"pin": 29 * MIB, "user": 71 * MIB}


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        (
            [("{budget: 8MiB}", "{budget: 200KiB}")],
            "namespaces.user.nvm.budget",
            "200KiB is 3 regions of 64KiB here; the least is 4 regions, 256KiB",
        ),
        (
            [
                ("nvm:\n  dev", "nvm:\n  region_size: 16MiB\n  dev"),
                ("nvm/two, size: 64MiB", "nvm/two, size: 16MiB"),
                ("size: 64MiB", "size: 512MiB"),
                ("{budget: 8MiB}", "{budget: 64MiB}"),
            ],
            "nvm.devices[1].size",
            "16MiB holds no region of 16MiB",
        ),
        (
            # Bytes that fit, but not once they are cut: 63 regions of 1MiB on each.
            [
                ("nvm:\n  dev", "nvm:\n  region_size: 1MiB\n  dev"),
                ("{budget: 60%}", "{budget: 119MiB}"),
            ],
            "nvm.devices",
            "add up to 127.0MiB, but in whole regions of 1MiB the devices hold 126.0MiB; "
            "use shares such as 40%",
        ),
        (
            [("size: 64MiB", "size: 1TiB")],
            "nvm.devices",
            "at most 1TiB can be addressed: give them a smaller size",
        ),
    ],
)
def test_what_does_not_fit_the_devices_is_told(
    changes: list[tuple[str, str]], where: str, words: str
) -> None:
    config = parse_config(_changed(*changes))
    for build in (nvm_plan, node_config, budgets):
        with pytest.raises(ConfigError) as caught:
            build(config)
        (problem,) = caught.value.problems
        assert problem.where == where
        assert words in problem.message


def test_memory_that_the_nvm_tier_alone_fills_is_told() -> None:
    config = parse_config(_changed(("memory: {size: 128MiB}", "memory: {size: 17MiB}")))
    with pytest.raises(ConfigError) as caught:
        node_config(config)
    (problem,) = caught.value.problems
    assert problem.where == "memory"
    assert "too small" in problem.message
    assert "nvm.read_memory" in problem.message


def test_dram_budgets_are_shares_of_what_the_nvm_tier_leaves() -> None:
    config = parse_config(_GOOD)
    native = node_config(config)
    bytes_of = budgets(config)
    assert sum(bytes_of.values()) <= native.arena_bytes()
    assert native.nvm_memory_bytes() > 16 * MIB  # read_memory
    assert native.arena_bytes() + native.nvm_memory_bytes() < 128 * MIB
    assert bytes_of["pin", "main"] == pytest.approx(native.arena_bytes() / 2, rel=0.01)


# ---- block devices -------------------------------------------------------------------------------


def test_a_block_device_may_leave_its_size_out() -> None:
    raw = yaml.safe_load(_changed(("{path: nvm/two, size: 64MiB}", "{path: raw}")))
    sizes = {"raw": 1 * GIB}
    config, problems = check(raw, device_bytes=sizes.get)
    assert problems == []
    assert config is not None
    plan = _planned(config, **sizes)
    assert plan.devices == (("nvm/one", 64 * MIB), ("raw", GIB))
    assert plan.regions * plan.region_bytes > GIB
    # Where it is not there, as when a config is checked on another machine, that is told.
    with pytest.raises(ConfigError, match=r"nvm.devices\[1\].size: missing; raw is no block"):
        nvm_plan(config, lambda _path: None)


def test_the_kernel_is_asked_for_a_block_devices_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4096)
    assert block_device_bytes(str(tmp_path / "file")) is None
    assert block_device_bytes(str(tmp_path)) is None
    assert block_device_bytes(str(tmp_path / "nothing")) is None
    assert block_device_bytes("/dev/null") is None  # a device, but of characters

    class Status:
        st_mode = 0o060660
        st_rdev = (259 << 8) | 3

    (tmp_path / "259:3").mkdir()
    (tmp_path / "259:3" / "size").write_text("2048\n")
    monkeypatch.setattr(config_nvm, "_BLOCK_DEVICES", tmp_path)
    monkeypatch.setattr("os.stat", lambda _path: Status)
    assert block_device_bytes("/dev/of/a/test") == MIB
    (tmp_path / "259:3" / "size").write_text("what\n")
    assert block_device_bytes("/dev/of/a/test") is None


# ---- what the engine is told ---------------------------------------------------------------------


def test_every_setting_reaches_the_engine() -> None:
    raw: dict[str, Any] = yaml.safe_load(_GOOD)
    raw["nvm"] |= {
        "region_size": "512KiB",
        "io": "threads",
        "direct": "off",
        "queue_depth": 33,
        "io_threads": 5,
        "coalesce_gap": 0,
        "queued_reads": 77,
        "read_memory": "5MiB",
        "write_buffers": 3,
        "write_rate": "200MiB",
        "errors_max": 9,
        "probe_interval": "250ms",
    }
    raw["namespaces"]["pin"] |= {
        "nvm": {
            "budget": "25%",
            "admission": "frequency",
            "admission_frequency": 3,
            "promotion": "never",
        },
        "speculative": {"after": "500us", "budget": "10%"},
    }
    config = parse_config(yaml.safe_dump(raw))
    native = node_config(config)
    nvm = native.nvm
    assert nvm is not None
    assert nvm.devices == [("nvm/one", 64 * MIB), ("nvm/two", 64 * MIB)]
    assert (nvm.region_bytes, nvm.io, nvm.direct) == (512 * KIB, "threads", False)
    assert (nvm.queue_depth, nvm.io_threads, nvm.queued_reads) == (33, 5, 77)
    assert (nvm.coalesce_gap_bytes, nvm.read_memory_bytes) == (0, 5 * MIB)
    assert (nvm.write_buffers, nvm.write_bytes_per_second) == (3, 200 * MIB)
    assert (nvm.errors_max, nvm.probe_interval_ms) == (9, 250)
    pin, user = native.namespaces
    assert pin.nvm_budget_bytes == int(0.25 * 254) * 512 * KIB
    assert (pin.nvm_admission, pin.nvm_admission_frequency) == ("frequency", 3)
    assert pin.nvm_promotion == "never"
    assert pin.speculative_budget == pytest.approx(0.1)
    assert pin.speculative_after_us == 500
    assert (user.nvm_budget_bytes, user.speculative_budget) == (8 * MIB, 0)
    assert (user.nvm_admission, user.nvm_promotion) == ("all", "second_hit")


@pytest.mark.parametrize(
    ("text", "lateness", "again"),
    [
        ("p99", Lateness(quantile=0.99), "p99"),
        ("p99.9", Lateness(quantile=0.999), "p99.9"),
        ("p95", Lateness(quantile=0.95), "p95"),
        (" p50 ", Lateness(quantile=0.5), "p50"),
        ("2ms", Lateness(microseconds=2000), "2ms"),
        ("500us", Lateness(microseconds=500), "500us"),
        ("1000us", Lateness(microseconds=1000), "1ms"),
        ("1s", Lateness(microseconds=1_000_000), "1s"),
    ],
)
def test_lateness_is_a_quantile_or_a_time(text: str, lateness: Lateness, again: str) -> None:
    assert parse_lateness(text) == lateness
    assert str(lateness) == again
    assert parse_lateness(again) == lateness
    assert parse_lateness(lateness) is lateness


def test_effective_settings_are_a_valid_config_again() -> None:
    config = parse_config(_GOOD)
    effective = effective_settings(config)
    assert effective["nvm"]["region_size"] == "auto"
    assert effective["namespaces"]["pin"]["nvm"]["budget"] == "60%"
    assert effective["namespaces"]["pin"]["speculative"] == {"after": "p99", "budget": "5%"}
    again = parse_config(yaml.safe_dump(effective))
    assert (again.nvm, again.namespaces) == (config.nvm, config.namespaces)


def test_check_config_prints_what_is_in_effect(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(_GOOD)
    command = [sys.executable, "-m", "cache_daemon.cli", "check-config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = [" ".join(line.replace("│", " ").split()) for line in done.stdout.splitlines()]
    assert "device nvm/one 64.0MiB 511" in lines
    assert "namespace pin (60%) 76.6MiB 613" in lines
    assert "namespace user (8MiB) 8.0MiB 64" in lines
    assert "one region 128KiB 1" in lines
    assert any(line.startswith("of memory.size: index slots, buffers") for line in lines)
