"""Ray as far as a scan needs it: connecting quietly, and what there is room for."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anomaly_vae.errors import ClusterError, ConfigError

_CPUS = 4
"""Threads of an actor without a GPU; more of them gain less than another actor does."""


@dataclass(frozen=True)
class Cluster:
    """Where a scan runs. `address` None: this machine alone; `auto`: the cluster that it belongs to.

    `actors` None: as many as find room. `gpus`: share of a GPU for each, None: one where the cluster has any.
    """

    address: str | None = None
    actors: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ConfigError(f"--actors must be at least 1, not {self.actors}")
        if self.gpus is not None and (self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus))):
            raise ConfigError(f"--gpus-per-actor is a share such as 0.5, or a whole number, not {self.gpus:g}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ConfigError("--address ray://...: a scan keeps its ledger on a machine of the cluster; run it there, "
                              "with --address auto, or by `ray job submit`")  # fmt: skip


@dataclass(frozen=True)
class Share:
    """What each of `actors` actors has to itself."""

    actors: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        return ("1 CPU" if self.cpus == 1 else f"{self.cpus} CPUs") + (f" and {self.gpus:g} GPU" if self.gpus else "")

    @classmethod
    def of(cls, cluster: Cluster, device: str, nodes: list[dict[str, float]]) -> "Share":
        """Shares of the machines `nodes`, each by its resources; raises `ConfigError` where no actor finds room."""
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device {device}: on a cluster each actor has devices of its own; use auto, cuda, cpu")
        gpus = cluster.gpus
        if gpus is None:
            gpus = 1.0 if device == "cuda" or (device == "auto" and any(node.get("GPU") for node in nodes)) else 0.0
        if device == "cpu" and gpus:
            raise ConfigError(f"--device cpu and --gpus-per-actor {gpus:g} contradict each other; leave out one")
        fit = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
        if not fit:
            what = f"{gpus:g} GPU and a CPU" if gpus else "a CPU"
            raise ConfigError(f"no machine of the cluster has {what} for an actor; see `ray status`")
        if gpus:
            cpus = max(1, min(int(node["CPU"] / (node["GPU"] / gpus)) for node in fit))
            room = sum(int(min(node["GPU"] / gpus, node["CPU"] / cpus)) for node in fit)
        else:
            cpus = min(_CPUS, *(int(node["CPU"]) for node in fit))
            if cluster.actors is not None:
                cpus = max(1, min(cpus, int(sum(node["CPU"] for node in fit) / cluster.actors)))
            room = sum(int(node["CPU"] / cpus) for node in fit)
        return cls(room if cluster.actors is None else cluster.actors, cpus, gpus)


def imported() -> Any:
    """Ray; raises `ConfigError` where it is not installed."""
    try:
        import pandas as pd  # noqa: F401 - what ray[data] brings, without the second that importing ray.data takes
        import ray
    except ImportError as error:
        what = f"--engine ray needs Ray ({error}): pip install 'anomaly-vae[ray]', or use --engine local"
        raise ConfigError(what) from None
    return ray


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """The cluster at `address`, or one of this machine alone; what this process is connected to already is taken."""
    ray = imported()
    with _quiet():
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody outside
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # a lost machine is dealt with here
        os.environ.setdefault("RAY_worker_niceness", "0")  # on a busy machine the actors would hardly ever begin
        alone = {} if address else {"include_dashboard": False}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **alone)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            what = f"no Ray cluster at --address {address or 'local'} ({reason})"
            raise ClusterError(f"{what}; see `ray status`") from None
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own remarks: what matters of them is said in one line when a scan fails."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def alive() -> dict[str, dict[str, float]]:
    """The machines of the cluster by their names, with what each has."""
    return {node["NodeID"]: node["Resources"] for node in imported().nodes() if node["Alive"]}


def bound_here() -> dict[str, float]:
    """What only this machine has, where the manifest lies."""
    ray = imported()
    resources = alive()[ray.get_runtime_context().get_node_id()]
    names = [name for name in resources if name.startswith("node:")]
    # The head's own name is no other's even where machines share an address.
    return {max(names, key=lambda name: "__internal_head__" in name): 0.001}
