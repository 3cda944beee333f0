"""From settings to the engine's own configuration: what fits, and what the engine is told."""

import socket

import pytest

from cache_daemon._native import Node
from cache_daemon.config import ConfigError, parse_config
from cache_daemon.config_node import budgets, node_config

_TEXT = """\
listen: {{grpc: [127.0.0.1:0]}}
memory: {{size: {size}, expected_item_size: {item}}}
namespaces:
  a:
    store: s
    default_domain: y
    negative_ttl: 250ms
    fetch_timeout: 1500ms
    rules: [{{prefix: "p:", asked_at_least: 3, domain: x}}]
    domains:
      x: {{budget: {x}, ttl: 1h30m, ttl_jitter: 5%, policy: tinylfu, refresh_ahead: 20%}}
      y: {{budget: {y}}}
stores:
  s: {{type: redis, guard: {{concurrency: 3, timeout: 700ms}}, max_batch_keys: 77, queue_keys: 999}}
limits: {{max_value_size: 1MiB, max_batch_keys: 123, max_reply_size: 3MiB, max_pending_batches: 45}}
refresh: {{keys_per_second: 67}}
"""


def _config(size: str = "64MiB", x: str = "60%", y: str = "40%", item: str = "256") -> str:
    return _TEXT.format(size=size, x=x, y=y, item=item)


@pytest.mark.parametrize("item", ["16", "256", "64KiB"])
@pytest.mark.parametrize("size", ["2MiB", "5MiB", "33MiB", "64MiB", "1000MiB"])
def test_shares_that_add_up_to_all_fit_at_any_size(size: str, item: str) -> None:
    config = parse_config(_config(size, item=item))
    bytes_of = budgets(config)
    native = node_config(config)
    total = sum(bytes_of.values())
    assert total <= native.arena_bytes() < config.memory.size
    assert total >= 0.99 * native.arena_bytes()
    assert bytes_of["a", "x"] / total == pytest.approx(0.6, abs=0.001)


def test_an_engine_can_be_built_of_it() -> None:
    node = Node(node_config(parse_config(_config("8MiB"))))
    budget = {
        sample.labels["domain"]: sample.value
        for sample in node.samples()
        if sample.name == "feature_cache_domain_budget_bytes"
    }
    node.stop()
    assert set(budget) == {"x", "y"}
    assert budget["x"] > budget["y"] > 0


def test_every_setting_reaches_the_engine() -> None:
    native = node_config(parse_config(_config()))
    assert native.memory_bytes == 64 << 20
    assert native.expected_item_bytes == 256
    assert native.segment_bytes == 0
    assert native.huge_pages
    assert native.max_value_bytes == 1 << 20
    assert native.max_batch_keys == 123
    assert native.max_reply_bytes == 3 << 20
    assert native.max_pending_batches == 45
    assert native.refresh_keys_per_second == 67

    (namespace,) = native.namespaces
    assert (namespace.name, namespace.store, namespace.default_domain) == ("a", "s", "y")
    assert (namespace.negative_ttl_ms, namespace.fetch_timeout_ms) == (250, 1500)
    (rule,) = namespace.rules
    assert (rule.domain, rule.prefix, rule.asked_at_least) == ("x", b"p:", 3)

    x, y = namespace.domains
    assert (x.name, x.policy, x.ttl_ms) == ("x", "tinylfu", 5_400_000)
    assert (x.ttl_jitter, x.refresh_ahead) == pytest.approx((0.05, 0.2))
    assert (y.name, y.policy, y.ttl_ms, y.refresh_ahead) == ("y", "s3fifo", 0, 0)

    (store,) = native.stores
    assert (store.name, store.concurrency, store.timeout_ms) == ("s", 3, 700)
    assert (store.max_batch_keys, store.queue_keys) == (77, 999)


@pytest.mark.parametrize(
    ("size", "x", "y", "where", "words"),
    [
        ("64MiB", "40MiB", "23.9MiB", "namespaces", "index and tables leave"),
        ("64MiB", "1%", "63MiB", "namespaces", "index and tables leave"),
        ("64MiB", "60%", "1KiB", "namespaces.a.domains.y.budget", "the least is 64KiB"),
        ("2MiB", "1%", "40%", "namespaces.a.domains.x.budget", "the least is 64KiB"),
    ],
)
def test_what_does_not_fit_is_told(size: str, x: str, y: str, where: str, words: str) -> None:
    config = parse_config(_config(size, x, y))
    with pytest.raises(ConfigError) as caught:
        node_config(config)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert words in problem.message


def test_memory_that_the_tables_alone_fill_is_told() -> None:
    config = parse_config(_config("1MiB", item="1"))
    with pytest.raises(ConfigError, match=r"memory: .*too small"):
        node_config(config)


# ---- roots and leaves ----------------------------------------------------------------------------

_SHARDED = """\
topology: sharded
listen: {{grpc: [127.0.0.1:7070]}}
sharding:
  role: {role}
  cluster: test
  zookeeper: {{hosts: "127.0.0.1:2181/test"}}
  {role}: {more}
namespaces:
  a: {{domains: {{x: {{budget: 60%}}, y: {{budget: 40%}}}}, default_domain: y, negative_ttl: 1m}}
"""


def test_a_leaf_is_told_what_to_remember() -> None:
    text = _SHARDED.format(role="leaf", more="{write_log: 1MiB}") + "memory: {size: 8MiB}\n"
    native = node_config(parse_config(text))
    assert native.root is None
    assert native.leaf is not None
    assert native.leaf.write_log_bytes == 1 << 20
    assert native.shard_count == 1024


def test_every_setting_of_a_root_reaches_it() -> None:
    more = (
        "{leaf_timeout: 123ms, attempts: 4, retry_budget: 7%, threads: 5, connections_per_leaf: 6, "
        "hedge: {after: 3ms, budget: 9%}, store_fallback_budget: 11%}"
    )
    text = _SHARDED.format(role="root", more=more).replace("negative_ttl: 1m", "store: s")
    text += "stores: {s: {type: redis}}\n"
    native = node_config(parse_config(text))
    root = native.root
    assert native.leaf is None
    assert root is not None
    assert (root.leaf_timeout_ms, root.attempts, root.retry_budget) == (123, 4, 0.07)
    assert (root.threads, root.connections_per_leaf) == (5, 6)
    assert (root.hedge, root.hedge_after_us, root.hedge_budget) == (True, 3000, 0.09)
    assert root.store_budget == 0.11
    assert native.memory_bytes == 0
    Node(native).stop()


def test_a_root_does_not_hedge_without_a_budget() -> None:
    text = _SHARDED.format(role="root", more="{hedge: {budget: 0}}")
    root = node_config(parse_config(text)).root
    assert root is not None
    assert not root.hedge


def test_a_hot_tier_takes_its_memory_and_keeps_values_for_its_age() -> None:
    text = _SHARDED.format(role="root", more="{hot_tier: {memory: 8MiB, max_age: 300ms}}")
    config = parse_config(text)
    native = node_config(config)
    assert native.memory_bytes == 8 << 20
    assert set(budgets(config)) == {("a", "x"), ("a", "y")}
    (namespace,) = native.namespaces
    assert namespace.negative_ttl_ms == 300
    assert {domain.ttl_ms for domain in namespace.domains} == {300}
    assert {domain.ttl_jitter for domain in namespace.domains} == {0}
    Node(native).stop()


def test_what_is_recorded_reaches_the_engine() -> None:
    assert node_config(parse_config(_config())).record is None
    warmup = """\
warmup:
  record:
    {dir: /log, sample: 5%, by: keys, window: 90s, size: 3MiB, namespaces: {a: hash},
     hash_key: sixteen letters!}
"""
    record = node_config(parse_config(_config() + warmup)).record
    assert record is not None
    assert (record.dir, record.sample, record.by) == ("/log", 0.05, "keys")
    assert (record.window_ms, record.max_bytes) == (90_000, 3 << 20)
    assert record.privacy == {"a": "hash"}
    assert record.host == socket.gethostname()


def test_a_leafs_log_has_the_name_that_it_has_in_the_cluster() -> None:
    sharding = """\
topology: sharded
sharding:
  {role: leaf, cluster: test, zookeeper: {hosts: 'a:2181/cache'}, leaf: {name: leaf-7}}
warmup: {record: {dir: /log}}
"""
    text = _config().replace("127.0.0.1:0", "127.0.0.1:7070")
    record = node_config(parse_config(text + sharding)).record
    assert record is not None
    assert (record.host, record.by, record.sample) == ("leaf-7", "requests", 0.1)
