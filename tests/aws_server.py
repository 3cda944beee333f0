"""What an EC2 instance sees of AWS, as a real HTTP server: its metadata (IMDSv2 only), a role's
credentials there, and the calls of the Auto Scaling API that lifecycle hooks make."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

__all__ = ["AwsServer"]

_TOKEN = "token of a session"
_ROLE = "latest/meta-data/iam/security-credentials/"


class AwsServer:
    """Listens on loopback. Tests change its attributes while it runs."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {
            "latest/meta-data/instance-id": "i-0123456789abcdef0",
            "latest/meta-data/placement/region": "eu-north-1",
            "latest/meta-data/autoscaling/target-lifecycle-state": "InService",
            _ROLE: "feature-cache",
            f"{_ROLE}feature-cache": json.dumps(
                {
                    "Code": "Success",
                    "AccessKeyId": "AKIDEXAMPLE",
                    "SecretAccessKey": "not a real one",
                    "Token": "session",
                    "Expiration": "2099-01-01T00:00:00Z",
                }
            ),
        }
        self.has_tokens = True
        self.failures_left = 0  # of the metadata service: so many times 500
        self.hook = {
            "LifecycleHookName": "warm",
            "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING",
            "HeartbeatTimeout": "30",
        }
        self.state = "Pending:Wait"  # of the instance in its group
        # Of an action, in order: what it is refused with, None: it is carried out.
        self.answers: dict[str, list[tuple[int, str, str] | None]] = {}
        self.calls: list[dict[str, str]] = []
        self.credentials: list[str] = []  # the Authorization header of each call
        self.reads: list[str] = []
        handler = type("Handler", (_Handler,), {"aws": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process on that instance."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url,
            "AWS_ENDPOINT_URL_AUTO_SCALING": self.url,
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "false",
        }

    def of(self, action: str) -> list[dict[str, str]]:
        return [call for call in list(self.calls) if call["Action"] == action]

    @property
    def results(self) -> list[str]:
        """What the group was told."""
        return [call["LifecycleActionResult"] for call in self.of("CompleteLifecycleAction")]

    def __enter__(self) -> "AwsServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    aws: AwsServer

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token" or not self.aws.has_tokens:
            self._send(403, "")
        elif "x-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
            self._send(400, "")
        else:
            self._send(200, _TOKEN)

    def do_GET(self) -> None:
        path = self.path[1:]
        self.aws.reads.append(path)
        if self.headers.get("x-aws-ec2-metadata-token") != _TOKEN:
            self._send(401, "")
        elif self.aws.failures_left > 0:
            self.aws.failures_left -= 1
            self._send(500, "")
        elif path in self.aws.metadata:
            self._send(200, self.aws.metadata[path])
        else:
            self._send(404, "not found")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        call = {name: values[0] for name, values in parse_qs(body).items()}
        self.aws.calls.append(call | {"at": str(time.monotonic())})
        self.aws.credentials.append(self.headers.get("Authorization", ""))
        action = call["Action"]
        queue = self.aws.answers.get(action, [])
        refusal = queue.pop(0) if queue else None
        if refusal is not None:
            status, code, message = refusal
            self._send(
                status,
                f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code>"
                f"<Message>{escape(message)}</Message></Error></ErrorResponse>",
            )
            return
        result = self._result(action)
        self._send(
            200, f"<{action}Response><{action}Result>{result}</{action}Result></{action}Response>"
        )

    def _result(self, action: str) -> str:
        if action == "DescribeLifecycleHooks":
            fields = "".join(f"<{name}>{text}</{name}>" for name, text in self.aws.hook.items())
            return f"<LifecycleHooks><member>{fields}</member></LifecycleHooks>"
        if action == "DescribeAutoScalingInstances":
            return (
                "<AutoScalingInstances><member><InstanceId>i-0123456789abcdef0</InstanceId>"
                f"<LifecycleState>{self.aws.state}</LifecycleState></member>"
                "</AutoScalingInstances>"
            )
        return ""

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
