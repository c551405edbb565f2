"""A scan on a cluster of several machines tells what a scan here tells, whoever is killed meanwhile."""

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_bytes import bad_bytes

from anomaly_vae import ConfigError, DataError, ray_pipeline, scan_ray
from anomaly_vae.entries import Read, Reader
from anomaly_vae.errors import ClusterError
from anomaly_vae.ray_cluster import Cluster, Share
from anomaly_vae.scan_ray import Opening, RayScored
from anomaly_vae.scan_rows import scored
from anomaly_vae.scanning import Scan
from anomaly_vae.sources import Folder, source_of
from anomaly_vae.tables import reading

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'anomaly-vae[ray]')")

MANY = 4000
MEGABYTES_100 = 100 << 20


@pytest.fixture(scope="module")
def cluster():
    """Machines that are processes of this one: one to drive, without a CPU for actors, and two with one each."""
    from ray.cluster_utils import Cluster as Machines

    os.environ |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    machines = Machines(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": MEGABYTES_100, "include_dashboard": False},
    )
    try:
        for _ in range(2):
            machines.add_node(num_cpus=1, object_store_memory=MEGABYTES_100)
        ray.init(address=machines.address, log_to_driver=False, logging_level=logging.CRITICAL)
        # What tests define is known to no other process.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield machines
    finally:
        ray.shutdown()
        machines.shutdown()


@pytest.fixture(scope="module")
def pictures(digits_folder, tmp_path_factory):
    """Some thousand pictures in folders, a few of which are bad."""
    root = tmp_path_factory.mktemp("many")
    files = sorted(digits_folder.rglob("*.png"))
    for i in range(MANY):
        place = root / f"{i % 7}" / f"{i:05d}.png"
        place.parent.mkdir(exist_ok=True)
        place.hardlink_to(files[i % len(files)])
    (root / "3" / "broken.png").write_bytes(bad_bytes()["half a png"])
    (root / "3" / "empty.jpg").write_bytes(b"")
    (root / os.fsdecode(b"caf\xe9.png")).hardlink_to(files[0])
    (root / "9.png").symlink_to(root / "missing.png")
    return root


@pytest.fixture(scope="module")
def local(tiny_bundle, pictures, tmp_path_factory):
    """The rows that a scan without a cluster tells."""
    out = tmp_path_factory.mktemp("local") / "out.parquet"
    rows = scan(tiny_bundle, Folder(pictures), out, lambda source, folder: scored)
    assert len(rows) == MANY + 4
    assert sum(row["error"] is not None for row in rows) == 3
    return rows


def scan(bundle, source, out, score_of, report=lambda counts: None):
    engine = Opening.of(bundle, "cpu", None, 32, "float32").engine("cpu")
    with Scan(engine, source, out) as running:
        running.finish(running.run(report, score_of(source, running.ledger.folder)))
    return [row for table in reading(out, running.schema) for row in table.to_pylist()]


def on_ray(bundle, tell=lambda line: None):
    return lambda source, folder: RayScored(
        Cluster(), source, Opening.of(bundle, "cpu", None, 32, "float32"), folder, tell
    )


def check_same(rows, local, bundle):
    """Equal but for rounding, in the same order: a score's unit is the quartile range of its calibration scores."""
    assert [row["path"] for row in rows] == [row["path"] for row in local]
    calibrated = Opening.of(bundle, "cpu", None, 32, "float32").engine("cpu").detector.calibration.scores[0]
    scores = [name for name in local[0] if name == "score" or name.startswith("part_")]
    units = {name: quartiles([row[name] for row in local if row["error"] is None]) for name in scores}
    units["score"] = quartiles(calibrated)
    for row, other in zip(rows, local, strict=True):
        for name, value in row.items():
            if name in units and value is not None:
                assert abs(value - other[name]) <= 1e-5 * units[name], (row["path"], name)
            else:
                assert value == other[name], (row["path"], name)


def quartiles(values):
    low, high = np.quantile(values, [0.25, 0.75])
    return high - low


@dataclass(frozen=True)
class Deadly:
    """Reads files, and kills whoever reads the file of this name, up to `times`."""

    reader: Reader
    name: str
    folder: Path
    times: int

    def __call__(self, path: str) -> Read:
        return partial(self.read, path)

    def read(self, path: str, most: int) -> bytes:
        deaths = len(list(self.folder.iterdir()))
        if path.endswith(self.name) and deaths < self.times:
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader(path)(most)


class DeadlyFolder(Folder):
    name, folder, times = "00600.png", Path(), 0

    @property
    def reader(self):
        return Deadly(super().reader, self.name, self.folder, self.times)


def deadly(pictures, folder, times):
    folder.mkdir()
    source = DeadlyFolder(pictures)
    for name, value in (("folder", folder), ("times", times)):
        object.__setattr__(source, name, value)
    return source


@pytest.mark.cluster
def test_rows_are_those_of_one_machine_though_a_worker_is_killed(cluster, tiny_bundle, pictures, local, tmp_path):
    source = deadly(pictures, tmp_path / "deaths", 1)
    rows = scan(tiny_bundle, source, tmp_path / "out.parquet", on_ray(tiny_bundle))
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    check_same(rows, local, tiny_bundle)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["deaths", "out.parquet"]


@pytest.mark.cluster
def test_a_file_that_kills_every_worker_is_named_and_what_was_done_is_kept(
    cluster, tiny_bundle, pictures, local, tmp_path, monkeypatch
):
    monkeypatch.setattr(scan_ray, "_DEATHS", 1)
    out = tmp_path / "out.parquet"
    with pytest.raises(ClusterError, match=r"workers died over the files from \S+\.png to \S+\.png"):
        scan(tiny_bundle, deadly(pictures, tmp_path / "deaths", 99), out, on_ray(tiny_bundle))
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    check_same(scan(tiny_bundle, Folder(pictures), out, lambda source, folder: scored), local, tiny_bundle)


@pytest.mark.cluster
def test_a_machine_that_is_lost_costs_only_its_blocks(cluster, tiny_bundle, pictures, local, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pipeline, "_PATIENCE", 1.0)
    monkeypatch.setattr(ray_pipeline, "_IN_VAIN", 99)
    lost, told = [], []

    def lose(counts):
        if counts.images >= 500 and not lost:
            lost.append(next(iter(cluster.worker_nodes)))
            cluster.remove_node(lost[0], allow_graceful=False)

    try:
        rows = scan(tiny_bundle, Folder(pictures), tmp_path / "out.parquet", on_ray(tiny_bundle, told.append), lose)
    finally:
        if lost:
            cluster.add_node(num_cpus=1, object_store_memory=MEGABYTES_100)
            cluster.wait_for_nodes()  # until the lost one is known to be lost as well
    assert lost
    assert set(told) <= {"the cluster lost a machine or worker; what it held is done again"}
    check_same(rows, local, tiny_bundle)


@pytest.mark.cluster
def test_who_waits_for_room_on_a_cluster_is_told_so(cluster, tiny_bundle, digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pipeline, "_PATIENCE", 1.0)
    others = [ray.remote(num_cpus=1)(Other).remote() for _ in range(2)]
    ray.get([one.is_there.remote() for one in others])
    told = []

    def make_room(line):
        told.append(line)
        for one in others:
            ray.kill(one)

    source = Folder(digits_folder)
    rows = scan(tiny_bundle, source, tmp_path / "out.parquet", on_ray(tiny_bundle, make_room))
    assert told == ["no actor has begun yet; has the cluster room for one, 1 CPU? See `ray status`"]
    assert len(rows) == len(list(source))


class Other:
    """Somebody else's work."""

    def is_there(self) -> bool:
        return True


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_scan_whose_driver_is_ended_goes_on_there_and_here(cluster, tiny_bundle, pictures, local, tmp_path, number):
    out = tmp_path / "out.parquet"
    code = "from anomaly_vae import cli, scan_ledger; scan_ledger._ROWS = 256; cli.main()"
    words = ["scan", tiny_bundle, pictures, "--out", out, "--engine", "ray", "--address", cluster.address]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ledger = tmp_path / ".out.parquet.scan"
    until = time.monotonic() + 60
    while len(list(ledger.glob("*.parquet"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not out.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; the same command goes on from here" in said
    before = sum(pq.read_metadata(one).num_rows for one in ledger.glob("*.parquet"))
    assert 3 * 256 <= before < len(local)
    counted = []
    go_on = on_ray(tiny_bundle) if number == signal.SIGKILL else lambda source, folder: scored
    rows = scan(tiny_bundle, Folder(pictures), out, go_on, lambda counts: counted.append(counts.images + counts.errors))
    assert counted[-1] == len(local) - before
    check_same(rows, local, tiny_bundle)


def test_a_machine_of_many_devices_is_shared_out():
    def share(nodes, device="auto", **how):
        one = Share.of(Cluster(**how), device, nodes)
        return one.actors, one.cpus, one.gpus

    small, gpus = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}
    assert share([small]) == (1, 2, 0)
    assert share([{"CPU": 16.0}, {"CPU": 16.0}, {}]) == (8, 4, 0)
    assert share([{"CPU": 16.0}], actors=16) == (16, 1, 0)
    assert share([gpus]) == (4, 4, 1)
    assert share([gpus, gpus], gpus=0.5) == (16, 2, 0.5)
    assert share([gpus], "cpu") == (4, 4, 0)
    assert share([small, gpus], actors=2) == (2, 4, 1)
    with pytest.raises(ConfigError, match="no machine of the cluster has 1 GPU"):
        share([small], "cuda")
    with pytest.raises(ConfigError, match="contradict"):
        share([gpus], "cpu", gpus=1.0)


def test_news_of_the_manifest_may_come_in_any_order():
    desk = ray_pipeline._Desk(5)
    for count, ended, taken in [(2, False, 0), (4, True, 1), (3, False, 2), (0, False, 0)]:
        desk.ring(count, ended, taken)
    asking = ThreadPoolExecutor(1)
    try:
        assert [asking.submit(desk.has, number).result(5) for number in range(4)] == [True] * 4
        last = asking.submit(desk.has, 4)
        desk.ring(4, True, 4)
        assert last.result(5) is False
    finally:
        desk.ring(9, True, 9)  # whoever waits in vain must not keep the test from ending
        asking.shutdown(wait=False)


def test_mistakes_name_the_remedy(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "x.zip").write_bytes(b"")
    opening = Opening.of(tiny_bundle, "cpu", None, 32, "float32")
    with pytest.raises(DataError, match=r"x\.zip.*unpack it, or use --engine local"):
        RayScored(Cluster(), source_of(str(tmp_path / "x.zip"), 1), opening, tmp_path)
    for wrong in ({"actors": 0}, {"gpus": -1.0}, {"gpus": 1.5}, {"address": "ray://there:10001"}):
        with pytest.raises(ConfigError, match="--"):
            Cluster(**wrong)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'anomaly-vae\[ray\]', or use --engine local"):
        RayScored(Cluster(), Folder(tmp_path), opening, tmp_path)
