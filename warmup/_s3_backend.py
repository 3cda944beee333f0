"""Objects in S3, or in a server that speaks it. The only module that knows boto3.

Files go up in parts, each with a checksum that the server compares. Retries are botocore's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)

from warmup.backend import BackendOptions, ObjectInfo
from warmup.errors import (
    AccessDenied,
    Conflict,
    Damaged,
    NotThere,
    SnapshotError,
    Unreachable,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = ["S3Backend"]

_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
_NOT_THERE = {"NoSuchBucket", "NoSuchKey", "404", "NotFound"}
_DENIED = {
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "403",
    "401",
}
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_PARTS_AT_ONCE = 4


class S3Backend:
    """See `Backend`."""

    def __init__(self, bucket: str, prefix: str, options: BackendOptions) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = options
        self._transfer = TransferConfig(
            multipart_threshold=options.part_bytes,
            multipart_chunksize=options.part_bytes,
            max_concurrency=_PARTS_AT_ONCE,
        )
        self._made: S3Client | None = None

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def _client(self) -> S3Client:
        # Made late: it looks for a region, and that there is none is to be told as other errors.
        if self._made is None:
            config = Config(
                connect_timeout=self._options.timeout_s,
                read_timeout=self._options.timeout_s,
                retries={"mode": "standard", "total_max_attempts": self._options.attempts},
                s3={"addressing_style": "path" if self._options.endpoint else "auto"},
                request_checksum_calculation="when_supported",
                response_checksum_validation="when_supported",
            )
            # A session of our own: the default one is not safe to be shared by threads.
            self._made = boto3.session.Session().client(
                "s3",
                endpoint_url=self._options.endpoint,
                # A server that is not AWS does not care, but a signature has one.
                region_name=self._options.region
                or ("us-east-1" if self._options.endpoint else None),
                config=config,
            )
        return self._made

    def find(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._told(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield ObjectInfo(
                        entry["Key"].removeprefix(self._prefix),
                        entry["Size"],
                        entry["LastModified"].timestamp(),
                    )

    def read(self, key: str) -> bytes:
        return self.read_tagged(key)[0]

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        with self._told(key):
            reply = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            with contextlib.closing(reply["Body"]) as body:
                data: bytes = body.read()
            if len(data) != reply["ContentLength"]:
                raise Unreachable(f"{self.url}/{key}: the connection ended too early")
            return data, reply["ETag"]

    def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None
    ) -> None:
        with self._told(key):
            if if_absent:
                self._client.put_object(
                    Bucket=self._bucket, Key=self._prefix + key, Body=data, IfNoneMatch="*"
                )
            elif if_tag is not None:
                self._client.put_object(
                    Bucket=self._bucket, Key=self._prefix + key, Body=data, IfMatch=if_tag
                )
            else:
                self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def put_file(self, key: str, path: Path) -> None:
        with self._told(key):
            self._client.upload_file(
                str(path),
                self._bucket,
                self._prefix + key,
                ExtraArgs={"ChecksumAlgorithm": "CRC32"},
                Config=self._transfer,
            )

    def delete(self, key: str) -> None:
        with self._told(key), contextlib.suppress(NotThere):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def expire_uploads(self, older_than_s: float) -> int:
        count = 0
        with self._told("uploads"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    # S3 counts by its own clock, and days are meant: ours is near enough.
                    if upload["Initiated"].timestamp() > time.time() - older_than_s:
                        continue
                    self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    count += 1
        return count

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._of_reply(error, what) from error
        except S3UploadFailedError as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ClientError):
                raise self._of_reply(cause, what) from error
            raise Unreachable(f"{self.url}: the upload failed: {_short(error)}") from error
        except _NO_CREDENTIALS as error:
            raise AccessDenied(
                f"{self.url}: no credentials: {_short(error)}; give them as AWS tools take them "
                "(environment, profile, or the role of the instance)"
            ) from error
        except (BotoCoreError, Boto3Error, OSError) as error:
            where = self._options.endpoint or "S3"
            raise Unreachable(f"{self.url}: {where} does not answer: {_short(error)}") from error

    def _of_reply(self, error: ClientError, what: str) -> SnapshotError:
        answer = error.response.get("Error", {})
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        code = answer.get("Code", "") or status
        where = f"{self.url}/{what}"
        if code == "NoSuchBucket":
            return NotThere(
                f"there is no bucket {self._bucket}: make it, or correct warmup.snapshots.url"
            )
        if code in _NOT_THERE:
            return NotThere(f"there is no {where}")
        if code in _CONFLICTS:
            return Conflict(f"{where}: somebody else was first")
        if code in _DENIED:
            return AccessDenied(
                f"{where}: refused ({code}): is there such a bucket, and are the credentials "
                "right, still valid, and allowed to read and write there?"
            )
        if code in _DAMAGED:
            return Damaged(f"{where}: it did not arrive as it was sent ({code})")
        if status.startswith("5") or status == "429" or code in ("SlowDown", "RequestTimeout"):
            return Unreachable(f"{where}: S3 says {code} after {self._options.attempts} attempts")
        return SnapshotError(f"{where}: S3 refuses it: {code}: {answer.get('Message', '')}")


def _short(error: BaseException) -> str:
    """An error's text, bounded: some carry whole requests."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
