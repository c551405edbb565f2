"""What Prometheus sees of a watch: read from its standing whenever it asks."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anomaly_vae.delivering import OUTCOMES, Standing
from anomaly_vae.errors import ConfigError

POSTED = ("sent", "retried", "given_up")


class WatchMetrics(Collector):
    """A collector of one watch."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def collect(self) -> Iterable[Metric]:
        """As it stands now."""
        now = self._standing
        files = CounterMetricFamily("anomaly_watch_files", "Files scored", labels=["outcome"])
        for outcome in OUTCOMES:
            files.add_metric([outcome], now.files[outcome])
        yield files
        posts = CounterMetricFamily("anomaly_watch_webhooks", "Webhooks by what became of a post", labels=["outcome"])
        for outcome in POSTED:
            posts.add_metric([outcome], now.webhooks[outcome])
        yield posts
        alarms = now.alarms
        for name, what, value in (
            ("anomaly_watch_waiting", "Files that are being written or wait to be scored", now.waiting),
            ("anomaly_watch_webhooks_waiting", "Verdicts that wait to be posted", now.webhooks_waiting),
            ("anomaly_watch_moves_waiting", "Files that could not be moved yet", now.failed_moves),
            ("anomaly_watch_unlisted", "Files and folders that could not be looked into", now.unlisted),
            ("anomaly_watch_expected_outlier_ratio", "Outliers expected if all is well", alarms.tolerated.expected),
            ("anomaly_watch_pictures", "Pictures that the alarms have counted", alarms.rate.images),
            ("anomaly_watch_outliers", "Outliers among these", alarms.rate.outliers),
            ("anomaly_watch_rate_alarm_evidence", "The rate alarm is at 200", alarms.rate.evidence),
        ):  # fmt: skip
            yield GaugeMetricFamily(name, what, value)
        raised = GaugeMetricFamily("anomaly_watch_alarm_raised", "1 for a raised alarm", labels=["kind"])
        for kind in ("rate", "shift"):
            raised.add_metric([kind], float(kind in set(alarms.raised())))
        yield raised
        effects = GaugeMetricFamily("anomaly_watch_shift_effect", "Move of most pictures, -1 to 1", labels=["part"])
        for one in alarms.shift.shifts():
            effects.add_metric([one.part], one.effect)
        yield effects


def serve_metrics(standing: Standing, host: str, port: int) -> str:
    """Answer at `/metrics` in a thread; the address. Raises `ConfigError` where that cannot be had."""
    registry = CollectorRegistry()
    registry.register(WatchMetrics(standing))
    ProcessCollector(registry=registry)
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"metrics cannot be served at {host}:{port} ({reason}); give another --metrics-port"
        ) from None
    return f"http://{host}:{server.server_port}/metrics"
