"""What Prometheus sees of the alarms: the same in every process that shares the store, a second after it was kept."""

import json
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy import RowMapping

from anomaly_vae.drift import RateAlarm
from service.alarms import KINDS

_BY = ["model", "version", "source"]


class AlarmGauges:
    """Gauges of the alarms of what is active; those of other versions go."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._evidence = Gauge(
            "anomaly_rate_alarm_evidence", "Evidence of more outliers than tolerated; the alarm is at 200", _BY,
            registry=registry,
        )  # fmt: skip
        self._effect = Gauge(
            "anomaly_shift_effect", "Move of most of the last pictures against calibration, from -1 to 1",
            [*_BY, "part"], registry=registry,
        )  # fmt: skip
        self._shown: dict[Gauge, set[tuple[str, ...]]] = {}
        self._raised = Gauge(
            "anomaly_alarm_raised", "1 for an alarm that was raised and not yet acknowledged", [*_BY, "kind"],
            registry=registry,
        )  # fmt: skip

    def show(self, rows: Sequence[RowMapping]) -> None:
        """Show these states and no others."""
        values: dict[Gauge, dict[tuple[str, ...], float]] = {self._evidence: {}, self._effect: {}, self._raised: {}}
        for row in rows:
            labels = [row[name] for name in _BY]
            values[self._evidence][tuple(labels)] = RateAlarm.unpacked(json.loads(row["rate"])).evidence
            for one in json.loads(row["shift"])["shifts"]:
                values[self._effect][*labels, one["part"]] = one["effect"]
            for kind in KINDS:
                values[self._raised][*labels, kind] = float(row[f"{kind}_raised"] is not None)
        for gauge, wanted in values.items():
            for gone in self._shown.get(gauge, set()) - wanted.keys():
                gauge.remove(*gone)
            for named, value in wanted.items():
                gauge.labels(*named).set(value)
            self._shown[gauge] = set(wanted)
