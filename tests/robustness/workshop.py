"""The processes in which damaged files are loaded: see worker.py. Two, one per core, and they begin before they are asked for."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
OVERALL = 300  # seconds for one answer; a case has an alarm of its own


class Worker:
    """One process. What it is asked it answers in order; ``answer`` waits for it."""

    def __init__(self):
        self.home = Path(tempfile.mkdtemp(prefix="chorus-files-"))
        quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.log = self.home / "log"
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.log, "wb"),  # noqa: SIM115 (the process writes it)
            text=True,
            env={**os.environ, **quiet},
            cwd=self.home,
        )
        self.answers: dict[str, dict] = {}
        self.last: dict = {}
        self.asked: list[str] = []
        self.news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, key: str, **what) -> None:
        self.asked.append(key)
        self.process.stdin.write(json.dumps({**what, "home": str(self.home)}) + "\n")
        self.process.stdin.flush()

    def _listen(self) -> None:
        for line in self.process.stdout:
            found = json.loads(line)
            with self.news:
                if "case" in found:
                    self.last = found
                else:
                    self.answers[self.asked[len(self.answers)]] = found
                self.news.notify_all()
        self.process.wait()
        with self.news:
            self.news.notify_all()

    def answer(self, key: str) -> dict:
        """What came of ``key``; an AssertionError where the process has ended before."""
        with self.news:
            done = self.news.wait_for(lambda: key in self.answers or self.process.returncode is not None, OVERALL)
        doing = self.asked[len(self.answers)] if len(self.answers) < len(self.asked) else None
        assert done, f"no answer in {OVERALL} s; it is at {doing}, {self.last}"
        # a signal is a negative number: -11 a crash, -14 the alarm for a case that does not end
        end = f"the process ended with {self.process.returncode} at {doing}, {self.last}"
        assert key in self.answers, f"{end}\n{self.log.read_text(errors='replace')[-2000:]}"
        return self.answers[key]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)


@functools.cache
def workers(count: int = 2) -> list[Worker]:
    """Running until the interpreter ends."""
    import atexit

    made = [Worker() for _ in range(count)]
    for worker in made:
        atexit.register(worker.close)
    return made
