"""A peer of a benchmark in its own process and environment, which sleeps while others are measured.

The worker reads one JSON value a line, and answers each with a line of "reply " and JSON, since the peer's own messages
go to stdout too. It says what it is once it is ready, and ends at the end of its input.
"""

import json
import os
import subprocess
from pathlib import Path


class Peer:
    """Raises RuntimeError, here and in `ask`, where the worker has ended: `needs` says what that may be for."""

    def __init__(self, python: str, worker: Path, *arguments: object, needs: str, **environment: str):
        # -P: else bench/ comes first among the places that the worker's imports are looked up in.
        command = [python, "-P", str(worker), *map(str, arguments)]
        # Peers compile operations at first use, with the ninja that lies beside their Python.
        path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
        self._needs = needs
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._reply()
        """The worker's first words."""

    def ask(self, question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _reply(self):
        for line in self._process.stdout:
            if line.startswith("reply "):
                return json.loads(line.removeprefix("reply "))
        raise RuntimeError(
            f"{self._process.args[0]} ended with {self._process.wait()}, see its messages above: does it have "
            f"{self._needs}?"
        )
