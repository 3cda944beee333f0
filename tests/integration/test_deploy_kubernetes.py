"""The manifests of deploy/kubernetes: valid, and in step with the config that they carry."""

import re
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cache_daemon import cli_warmup
from cache_daemon.config import Config, load_config
from cache_daemon.config_node import budgets
from cache_daemon.config_persist import STOP_GRACE_S
from cache_daemon.config_units import parse_duration
from tests.deploy_checks import DEPLOY, run, scripts
from tests.servers import free_port, wait_until

_FOLDER = DEPLOY / "kubernetes"
_FILES = sorted(_FOLDER.glob("*.yaml"))
_LINT = (
    "{extends: default, rules: {line-length: {max: 120}, document-start: disable, "
    "comments: {min-spaces-from-content: 1}}}"
)
_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_START_S = 120.0  # of a process, and of recovering what an earlier container left
_KEY_BYTES = 100  # of a replay, for one distinct key


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (
        document
        for path in _FILES
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] == kind
    )
    return dict(found)


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(\w*)", text)
    assert match is not None
    return int(match[1]) * _UNITS[match[2]]


@pytest.fixture
def pod() -> dict[str, Any]:
    return dict(manifest("StatefulSet")["spec"]["template"]["spec"])


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return dict(only)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = manifest("ConfigMap")["data"]
    assert list(data) == ["config.yaml"]
    path = tmp_path / "config.yaml"
    path.write_text(data["config.yaml"])
    return load_config(path)


def volume(pod: dict[str, Any], container: dict[str, Any], path: str) -> dict[str, Any]:
    """The volume that `path` of the container lies in."""
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    (at,) = (mount for mount in mounts if Path(path).is_relative_to(mount))
    assert not mounts[at].get("readOnly")
    (found,) = (each for each in pod["volumes"] if each["name"] == mounts[at]["name"])
    return dict(found)


# ---- valid ---------------------------------------------------------------------------------------


def test_every_manifest_is_what_kubernetes_takes() -> None:
    assert {path.stem for path in _FILES} == {
        "configmap",
        "poddisruptionbudget",
        "service",
        "serviceaccount",
        "statefulset",
    }
    done = run(str(scripts() / "kubernetes-validate"), "--strict", *map(str, _FILES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed for resource ") == len(_FILES)


def test_an_unknown_key_would_have_been_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    text = (_FOLDER / "statefulset.yaml").read_text()
    wrong.write_text(text.replace("failureThreshold: 180", "failureThresholds: 180"))
    done = run(str(scripts() / "kubernetes-validate"), "--strict", str(wrong))
    assert done.returncode != 0
    assert "failureThresholds" in done.stdout + done.stderr


def test_every_manifest_is_clean_yaml() -> None:
    done = run(str(scripts() / "yamllint"), "--strict", "-d", _LINT, str(_FOLDER))
    assert (done.returncode, done.stdout) == (0, "")


def test_the_daemon_takes_its_config(config: Config) -> None:
    assert config.warms
    assert sum(budgets(config).values()) <= config.memory.size
    assert config.insecure  # probes and clients come from other addresses


# ---- in step -------------------------------------------------------------------------------------


def test_everybody_means_the_same_pods_and_ports(
    pod: dict[str, Any], container: dict[str, Any], config: Config
) -> None:
    stateful, service = manifest("StatefulSet"), manifest("Service")
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert stateful["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    assert pod["serviceAccountName"] == manifest("ServiceAccount")["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.listen.http is not None
    addresses = {"grpc": config.listen.grpc[0], "http": config.listen.http}
    for name, address in addresses.items():
        assert address == f"0.0.0.0:{ports[name]}"
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    annotations = stateful["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["http"])


def test_the_container_is_the_images(pod: dict[str, Any], container: dict[str, Any]) -> None:
    image = (DEPLOY / "docker" / "Dockerfile").read_text()
    user = pod["securityContext"]["runAsUser"]
    assert f"USER {user}:{pod['securityContext']['runAsGroup']}" in image
    assert pod["securityContext"]["fsGroup"] == user
    assert 'ENTRYPOINT ["cache-daemon"]' in image
    assert "command" not in container
    (config_mount,) = (m for m in container["volumeMounts"] if m["name"] == "config")
    assert container["args"] == ["run", "--config", f"{config_mount['mountPath']}/config.yaml"]


def test_probes_ask_what_they_are_for(container: dict[str, Any]) -> None:
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/healthz"}
    for name in paths:
        assert container[f"{name}Probe"]["httpGet"]["port"] == "http"


def test_a_start_has_the_time_of_its_warm_up(container: dict[str, Any], config: Config) -> None:
    probe = container["startupProbe"]
    seconds = probe["periodSeconds"] * probe["failureThreshold"]
    assert config.warmup is not None
    assert seconds >= config.warmup.max_duration + _START_S


def test_an_end_has_the_time_of_its_drain(
    pod: dict[str, Any], container: dict[str, Any], config: Config
) -> None:
    program, group, command, *options = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (Path(program).name, group, command) == ("cache-daemon", "warmup", "drain")
    given = dict(option.split("=", 1) for option in options)
    known = CliRunner().invoke(cli_warmup.app, ["drain", "--help"], env={"COLUMNS": "200"})
    assert all(name in known.stdout for name in given)
    assert given["--config"] == container["args"][-1]
    assert config.persistence is not None
    needed_s = config.drain_timeout + config.persistence.shutdown_limit + STOP_GRACE_S
    timeout_s = parse_duration(given["--timeout"])
    assert timeout_s > needed_s
    grace_s = pod["terminationGracePeriodSeconds"]
    assert grace_s >= parse_duration(given["--delay"]) + timeout_s + STOP_GRACE_S


def test_what_is_written_has_a_volume_with_room(
    pod: dict[str, Any], container: dict[str, Any], config: Config
) -> None:
    assert config.persistence is not None
    memory = volume(pod, container, config.persistence.dir)["emptyDir"]
    assert memory["medium"] == "Memory"
    assert size(memory["sizeLimit"]) >= config.memory.size * 1.1
    assert config.warmup is not None
    assert config.warmup.record is not None
    log = volume(pod, container, config.warmup.record.dir)["emptyDir"]
    assert "medium" not in log  # a disk's
    assert size(log["sizeLimit"]) > config.warmup.record.size
    assert config.listen.admin is not None
    socket = volume(pod, container, config.listen.admin.removeprefix("unix:"))
    assert "emptyDir" in socket
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert limits["memory"] == requests["memory"]  # it takes all that at the start
    beyond = size(limits["memory"]) - config.memory.size
    assert beyond >= (1 << 30) + config.warmup.replay.max_keys * _KEY_BYTES
    assert size(limits["ephemeral-storage"]) > size(log["sizeLimit"])


def test_the_pod_may_do_little(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert manifest("ServiceAccount")["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        assert name not in pod
    assert not [each for each in pod["volumes"] if "hostPath" in each]


# ---- at work -------------------------------------------------------------------------------------


def test_a_pod_begins_is_probed_and_ends(container: dict[str, Any], tmp_path: Path) -> None:
    """What a kubelet does, with the manifests' config, probes and preStop, on smaller memory."""
    shared = Path(tempfile.mkdtemp(prefix="fc-pod-", dir="/dev/shm"))
    text = manifest("ConfigMap")["data"]["config.yaml"]
    for old, new in {
        "/srv/feature-cache": str(shared),
        "/run/feature-cache": str(tmp_path),
        "/var/lib/feature-cache": str(tmp_path),
        "s3://example-bucket": f"file://{tmp_path}/bucket",
        ", region: eu-north-1": "",
        "size: 4GiB": "size: 64MiB",
        "0.0.0.0:7070": f"127.0.0.1:{free_port()}",
        "0.0.0.0:7072": f"127.0.0.1:{(http := free_port())}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    config = tmp_path / "config.yaml"
    config.write_text(text)

    def here(words: list[str]) -> list[str]:
        return [word.replace(container["args"][-1], str(config)) for word in words]

    def passes(probe: str) -> bool:
        path = container[f"{probe}Probe"]["httpGet"]["path"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{http}{path}", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    daemon = str(scripts() / "cache-daemon")
    _, *hook = container["lifecycle"]["preStop"]["exec"]["command"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([daemon, *here(container["args"])], stderr=log) as process,
    ):
        try:
            wait_until(lambda: passes("startup"), 60, "the startup probe")
            assert passes("readiness")
            assert passes("liveness")
            done = run(daemon, *here(hook))
            assert done.returncode == 0, done.stderr
            assert "drained after" in done.stdout
            assert process.wait(10) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            shutil.rmtree(shared)
