"""Shows the progress and the errors of the set-up's steps to the user."""

from __future__ import annotations

import contextlib
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Max retries exceeded|ProxyError"
    r"|name resolution|Network is unreachable|Connection refused|SSLError|Failed to establish"
)


class SetupError(Exception):
    """An error that the user can fix; shown as one line without a traceback."""


class ProgressLine:
    """A progress line. It is updated in place on a terminal; elsewhere, a new line is printed every 20 seconds."""

    def __init__(self, title: str):
        self.title, self.start, self.shown = title, time.monotonic(), time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def tick(self, detail: str = ""):
        text = f"{self.title} ... {self.seconds:.0f} s  {detail}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", flush=True)
        elif time.monotonic() - self.shown > 20:
            self.shown = time.monotonic()
            print(text[:160], flush=True)

    def done(self):
        self.clear()
        print(f"{self.title}: {self.seconds:.1f} s", flush=True)

    def clear(self):
        if sys.stdout.isatty():
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)


def step(title: str, command: list, env: dict[str, str], log: Path) -> None:
    """Run one command of the set-up. Its output is appended to ``log``, and its newest line is shown on the screen."""
    line, lines, output = ProgressLine(title), queue.Queue(), []
    process = subprocess.Popen(
        [str(c) for c in command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def read():
        for text in process.stdout:
            lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        with open(log, "a", encoding="utf-8") as file:
            text = ""
            while text is not None:
                with contextlib.suppress(queue.Empty):
                    text = lines.get(timeout=1)
                    if text is not None:
                        file.write(text)
                        output.append(text.strip())
                line.tick(output[-1].split(" (from ")[0] if output else "")
    finally:
        if process.poll() is None and text is not None:
            process.terminate()
        process.wait()
    if process.returncode:
        line.clear()
        raise SetupError(f"{title} failed: {reason_of(output)} (full output: {log})")
    line.done()


def reason_of(output: list[str]) -> str:
    if any(NO_NETWORK.search(text) for text in output):
        return "the package index cannot be reached; check the network and run the same command again"
    errors = [text for text in output if text.lower().startswith("error")]
    return (errors or output or ["no output"])[-1]
