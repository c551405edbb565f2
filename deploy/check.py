"""Carry out the Dockerfile without a container engine: `python deploy/check.py --target cpu --build-arg NAME=VALUE`.

Its steps run in order in an empty folder that stands for the root of the image, with a clean virtual environment; then
a small model is trained with what they installed, the entry point serves it, and the health check asks it. What only
an engine can try stays untried: base images, the user's number, the read-only root, layers.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = re.compile(r"(?<![\w/.])/(?=(?:build|opt/anomaly-vae|data|spool|models)\b)")
"""The folders that the Dockerfile itself makes."""


@dataclass(frozen=True)
class Step:
    """An instruction and what follows it; `flags` are its --name=value."""

    word: str
    flags: dict[str, str]
    rest: str

    @property
    def command(self) -> list[str]:
        """As a program and its arguments; shell form goes through sh, as in an image."""
        if self.rest.startswith("["):
            listed: list[str] = json.loads(self.rest)
            return listed
        return ["/bin/sh", "-euc", self.rest]


@dataclass
class Stage:
    """`FROM base AS name` and the steps after it."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile, by name."""
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for step in _steps(text):
        if step.word == "FROM":
            base, _, name = step.rest.split()
            current = found[name] = Stage(name, base)
        elif current is not None:
            current.steps.append(step)
    return found


def _steps(text: str) -> Iterator[Step]:
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        if line.strip():
            word, rest = line.split(maxsplit=1)
            flags = dict(re.findall(r"--([\w-]+)=(\S+)\s", rest)) if word in {"COPY", "HEALTHCHECK"} else {}
            if word in {"COPY", "HEALTHCHECK"}:
                rest = re.sub(r"--[\w-]+=\S+\s+", "", rest)
            yield Step(word, flags, rest.strip())


class Image:
    """What an image would be: a folder for its root, its environment, and how it is started."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self.arguments = root, arguments
        self.entry: list[str] = []
        self.health: list[str] = []
        self._reset()

    def build(self, all_stages: dict[str, Stage], target: str) -> None:
        """Carry out a stage, after those that it begins from or copies from."""
        self._build(all_stages, target, set())

    def _build(self, all_stages: dict[str, Stage], name: str, done: set[str]) -> None:
        stage = all_stages[name]
        for step in stage.steps:
            source = step.flags.get("from")
            if source and source not in done:
                self._build(all_stages, source, done)
        if stage.base in all_stages:
            self._build(all_stages, stage.base, done)
        else:
            self._reset()
        for step in stage.steps:
            self._carry_out(step)
        done.add(name)

    def _reset(self) -> None:
        (self.root / "base").mkdir(exist_ok=True)
        python = self.root / "base" / "python"
        if not python.exists():
            python.symlink_to(Path(sys.executable).resolve())
        self.folder = self.root
        self.environment = {"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin"}
        kept = ("PIP_CERT", "PIP_FIND_LINKS", "PIP_DEFAULT_TIMEOUT", "HTTPS_PROXY", "https_proxy", "SSL_CERT_FILE")
        self.environment |= {name: os.environ[name] for name in kept if name in os.environ}

    def _inside(self, text: str) -> str:
        return PLACES.sub(f"{self.root}/", text)

    def _carry_out(self, step: Step) -> None:
        print(f"{step.word} {step.rest[:150]}", flush=True)
        if step.word == "ARG":
            name, _, default = step.rest.partition("=")
            value = self.arguments.get(name, default)
            if value or not name.startswith("PIP_"):  # pip takes an empty index for one
                self.environment[name] = value
        elif step.word == "ENV":
            for pair in shlex.split(step.rest):
                name, _, value = pair.partition("=")
                self.environment[name] = self._inside(value.replace("${PATH}", self.environment["PATH"]))
        elif step.word == "WORKDIR":
            self.folder = Path(self._inside(step.rest))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY":
            self._copy(step)
        elif step.word == "RUN":
            self.run([self._inside(word) for word in step.command])
        elif step.word == "HEALTHCHECK":
            self.health = json.loads(step.rest.removeprefix("CMD"))
        elif step.word in {"ENTRYPOINT", "CMD"}:
            self.entry = [*(self.entry if step.word == "CMD" else []), *map(self._inside, json.loads(step.rest))]

    def _copy(self, step: Step) -> None:
        *sources, place = map(self._inside, step.rest.split())
        for source in sources:
            if "from" in step.flags:  # stages share one root here
                assert source == place, step.rest
                assert Path(source).exists(), step.rest
            else:
                assert sent(source), f".dockerignore keeps {source} from the build"
                origin, target = ROOT / source, self.folder / place
                if origin.is_dir():
                    shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(origin, target)

    def run(self, command: list[str], **more: str) -> None:
        """Run to the end; raises `CalledProcessError`."""
        subprocess.run(command, cwd=self.folder, env=self.environment | more, check=True)


def sent(source: str) -> bool:
    """Whether .dockerignore, which keeps all but a list away, lets a path through."""
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    return patterns[0] == "*" and f"!{source}" in patterns


def serve_once(image: Image) -> None:
    """Train a little, start the entry point, and have the health check succeed; raises where any of it fails."""
    (image.root / "tmp").mkdir()
    small = ["image.height=16", "image.width=16", "image.channels=1", "training.steps=60", "data.normal=[0,1,2,3]"]
    options = [part for setting in small for part in ("-o", setting)]
    bundle = str(image.root / "models" / "active")
    train = [image.entry[0], "train", "--data", "digits", "--preset", "vae", "--out", bundle, *options]
    image.run(train, HOME=str(image.root / "tmp"))
    before = _files(image.root / "opt")
    ports = _free_ports(2)
    environment = image.environment | {
        "HOME": str(image.root / "tmp"), "ANOMALY_VAE_SERVE_HOST": "127.0.0.1",
        "ANOMALY_VAE_SERVE_PORT": str(ports[0]), "ANOMALY_VAE_SERVE_HEALTH_PORT": str(ports[1]),
    }  # fmt: skip
    process = subprocess.Popen(image.entry, cwd=image.folder, env=environment)
    try:
        until = time.monotonic() + 180
        while subprocess.run(image.health, env=environment, stderr=subprocess.DEVNULL).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the service did not become healthy")
            time.sleep(1)
    finally:
        process.terminate()
        code = process.wait(60)
    if code:
        raise SystemExit(f"the service ended with {code} instead of 0")
    if _files(image.root / "opt") != before:
        raise SystemExit("the service wrote beside its own code, which a read-only root forbids")
    print("the steps, the entry point and the health check work")


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def _free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    arguments = dict(pair.split("=", 1) for pair in options.build_arg)
    with tempfile.TemporaryDirectory() as folder:
        image = Image(Path(folder), arguments)
        image.build(stages((ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")), options.target)
        serve_once(image)


if __name__ == "__main__":
    main()
