"""`Metrics`: what Prometheus sees, on a registry that is handed in; every label has few values, all known here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
P_VALUES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FAILURES = (429, 500, 503, 504)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
STAGES = ("read", "decode", "queue", "judge", "draw")
SCANNED, MOST_SCANNED = "scan", 50
"""The source of scans that name none, and how many others are told apart."""
# Why a picture or a request got no score: refusals of the queue first, then what went wrong afterwards.
REJECTIONS = (
    "queue_full",
    "deadline",
    "draining",
    "failed",
    "too_large",
    "bad_request",
    "bad_image",
    "bad_archive",
    "too_many_archives",
    "unscorable",
    "no_access",
    "rate_limited",
)


class Metrics:
    """Counters of one process that serves one device. `source` names where its pictures come from, unless a key does.

    `base_rates`: outlier ratios that are declared of sources.
    """

    def __init__(
        self, registry: CollectorRegistry, source: str = "default", base_rates: Mapping[str, float] | None = None
    ) -> None:
        self.registry = registry
        self._source = source
        self._versions: dict[str, str] = {}
        self._ratios: dict[tuple[str, str], float] = {}
        self._sources: dict[tuple[str, str, str], _OfSource] = {}
        self._scored_by_gone, self._sent = 0, 0
        self._of_scans: set[str] = set()
        ProcessCollector(registry=registry)
        self._declare_traffic(registry)
        self._declare_verdicts(registry)
        self._declare_store(registry)
        base = Gauge("anomaly_base_outlier_ratio", "Outlier ratio declared of a source", ["source"], registry=registry)
        for name, rate in (base_rates or {}).items():
            base.labels(name).set(rate)
        # A metric looks its labels up under a lock each time; these are asked for at every request.
        self._of_stage = {stage: self._stages.labels(stage) for stage in STAGES}
        self._of_answer: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        for reason in REJECTIONS:
            self._rejected.labels(reason)

    def _declare_traffic(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "anomaly_http_requests", "Requests answered", ["route", "method", "code"], registry=registry
        )
        self._request_seconds = Histogram(
            "anomaly_http_request_duration_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=registry
        )
        self._stages = Histogram(
            "anomaly_stage_duration_seconds", "Time of each stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self._batch_size = Histogram(
            "anomaly_batch_size", "Pictures judged together", buckets=BATCHES, registry=registry
        )
        self._depth = Gauge("anomaly_queue_depth", "Pictures waiting for the model", registry=registry)
        self._oldest = Gauge("anomaly_queue_oldest_seconds", "Wait of the first in the queue", registry=registry)
        self._rejected = Counter(
            "anomaly_rejected", "Requests and pictures without a score", ["reason"], registry=registry
        )

    def _declare_verdicts(self, registry: CollectorRegistry) -> None:
        by = ["model", "version", "source"]
        self._scored = Counter("anomaly_images_scored", "Pictures scored", by, registry=registry)
        self._outliers = Counter("anomaly_outliers", "Pictures judged outliers by the policy", by, registry=registry)
        self._expected = Gauge(
            "anomaly_expected_outlier_ratio", "Outlier ratio expected of normal pictures", by, registry=registry
        )
        self._p_values = Histogram(
            "anomaly_p_value", "p-values; uniform for normal pictures", by, buckets=P_VALUES, registry=registry
        )
        of = ["model", "version"]
        self._info = Gauge("anomaly_model_info", "1 for the model in force", of, registry=registry)
        self._calibrated = Gauge(
            "anomaly_calibration_timestamp_seconds", "When the normals were scored that rank verdicts now", of,
            registry=registry,
        )  # fmt: skip
        self._normals = Gauge("anomaly_calibration_normals", "Normals that rank verdicts now", of, registry=registry)

    def _declare_store(self, registry: CollectorRegistry) -> None:
        self._store_seconds = Histogram(
            "anomaly_store_write_duration_seconds", "Time to keep a batch", buckets=SECONDS, registry=registry
        )
        self._store_lost = Counter("anomaly_store_lost", "What the store did not take", ["what"], registry=registry)
        self._store_waiting = Gauge("anomaly_store_waiting", "Verdicts not yet kept", registry=registry)
        self._store_up = Gauge("anomaly_store_up", "1 where the store can be written", registry=registry)
        for what in ("verdict", "picture"):
            self._store_lost.labels(what)

    def store_wrote(self, seconds: float) -> None:
        """One batch of verdicts was kept."""
        self._store_seconds.observe(seconds)

    def store_lost(self, what: str, count: int) -> None:
        """Verdicts or pictures that will never be kept."""
        self._store_lost.labels(what).inc(count)

    def watch_store(self, waiting: Callable[[], float], up: Callable[[], float]) -> None:
        """Read how the store stands when scraped."""
        self._store_waiting.set_function(waiting)
        self._store_up.set_function(up)

    def in_force(
        self,
        model: str,
        version: str,
        expected_outlier_ratio: float,
        normals: int,
        calibrated_at: float | None,
        sources: Iterable[str] = (),
    ) -> None:
        """Name the version of a model that answers from now on, and its calibration; its counters start at 0 for all
        `sources` that keys name, so that the first outlier is a visible increase."""
        before = self._versions.get(model)
        if before not in (None, version):
            for gauge in (self._info, self._calibrated, self._normals):
                gauge.remove(model, str(before))
        self._versions[model] = version
        self._info.labels(model, version).set(1)
        self._calibrated.labels(model, version).set(math.nan if calibrated_at is None else calibrated_at)
        self._normals.labels(model, version).set(normals)
        self._ratios[model, version] = expected_outlier_ratio
        for source in (self._source, *sources):
            self._of(model, version, source)
        for labels, counted in list(self._sources.items()):
            if labels[:2] == (model, version) and labels[2] not in self._of_scans:
                counted.expected.set(expected_outlier_ratio)

    def gone(self, model: str, version: str) -> None:
        """Forget the counters of a version that answers no more."""
        self._ratios.pop((model, version), None)
        if self._versions.get(model) == version:
            del self._versions[model]
            for gauge in (self._info, self._calibrated, self._normals):
                gauge.remove(model, version)
        for labels in [labels for labels in list(self._sources) if labels[:2] == (model, version)]:
            self._scored_by_gone += self._count(labels)
            del self._sources[labels]
            for metric in (self._scored, self._outliers, self._expected, self._p_values):
                metric.remove(*labels)

    def _of(self, model: str, version: str, source: str) -> "_OfSource":
        """The counters of one source; there are as many as the operator named, in keys and settings."""
        labels = (model, version, source)
        if labels not in self._sources:
            expected = self._expected.labels(*labels)
            expected.set(self._ratios.get((model, version), math.nan))
            self._sources[labels] = _OfSource(
                self._scored.labels(*labels), self._outliers.labels(*labels), self._p_values.labels(*labels), expected
            )
        return self._sources[labels]

    def watch_queue(self, depth: Callable[[], float], oldest_seconds: Callable[[], float]) -> None:
        """Read the queue when scraped."""
        self._depth.set_function(depth)
        self._oldest.set_function(oldest_seconds)

    def request(self, route: str, method: str, code: int, seconds: float) -> None:
        """One answered request; `route` must be a template, never a raw path."""
        answer = (route, method if method in METHODS else "other", code)
        if answer not in self._of_answer:
            # A series that begins with the first burst of failures would hide that burst: rates see increases alone.
            for failure in FAILURES if code < 400 else ():
                self._requests.labels(route, answer[1], failure)
            self._of_answer[answer] = self._requests.labels(*answer), self._request_seconds.labels(route)
        counted, timed = self._of_answer[answer]
        counted.inc()
        timed.observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """One stage of one picture, or of one request for `read`."""
        self._of_stage[stage].observe(seconds)

    def batch(self, size: int) -> None:
        """One batch the model judged."""
        self._batch_size.observe(size)

    def rejected(self, reason: str, count: int = 1) -> None:
        """Pictures or requests that got no score, by one of REJECTIONS."""
        self._rejected.labels(reason).inc(count)

    def verdicts(self) -> int:
        """How many pictures this process has scored."""
        return self._scored_by_gone + sum(self._count(labels) for labels in list(self._sources)) - self._sent

    def _count(self, labels: tuple[str, str, str]) -> int:
        named = dict(zip(("model", "version", "source"), labels, strict=True))
        return int(self.registry.get_sample_value("anomaly_images_scored_total", named) or 0)

    def verdict(self, model: str, version: str, p_value: float, outlier: bool, source: str | None = None) -> None:
        """One picture scored under the policy in force; `source`: where it came from, if the key told."""
        if (model, version) not in self._ratios:
            self._scored_by_gone += 1  # it was on its way when its version was retired
            return
        counted = self._of(model, version, source or self._source)
        counted.scored.inc()
        counted.p_values.observe(p_value)
        if outlier:
            counted.outliers.inc()

    def serves(self, model: str, version: str) -> bool:
        """Whether verdicts of this version are counted."""
        return (model, version) in self._ratios

    def sent(
        self, model: str, version: str, source: str, expected: float, verdicts: Sequence[tuple[float, bool]]
    ) -> None:
        """p-values and outliers of a scan that was made elsewhere; those of a version that is not served are not
        counted, and sources of scans beyond `MOST_SCANNED` count as one: whoever scans may name them freely."""
        if not self.serves(model, version):
            return
        known = any(labels[2] == source for labels in list(self._sources))
        if not known and len(self._of_scans) >= MOST_SCANNED:
            source = SCANNED
        counted = self._of(model, version, source)
        if not known:
            self._of_scans.add(source)
        if source in self._of_scans:
            counted.expected.set(expected)
        self._sent += len(verdicts)
        counted.scored.inc(len(verdicts))
        counted.outliers.inc(sum(outlier for _, outlier in verdicts))
        for p_value, _ in verdicts:
            counted.p_values.observe(p_value)


class _OfSource(NamedTuple):
    scored: Counter
    outliers: Counter
    p_values: Histogram
    expected: Gauge
