"""`cache-daemon warmup ...` as a child process for end-to-end tests."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Hook", "RunHook"]

_HOOK_S = 60.0


class Hook:
    """One hook, for the daemon whose admin socket lies in `folder`; its output is kept there."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.output = folder / f"hook {time.monotonic_ns()}"
        names = ("AWS_", "FEATURE_CACHE_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(names)}
        command = [str(Path(sys.executable).with_name("cache-daemon")), "warmup", *arguments]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--admin", f"unix:{folder}/admin.sock"],
                env=clean | environment,
                stdout=output,
                stderr=output,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        return self.process.wait(_HOOK_S)


RunHook = Callable[..., Hook]
