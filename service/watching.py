"""What of a served model the alarms go by, and their gauges."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from anomaly_vae.drift import tolerated_rate
from service.alarm_gauges import AlarmGauges
from service.alarms import Alarms, Watch
from service.database import Database
from service.served import Served


class Watching:
    """Alarms for whatever comes into force. `base_rates`: of sources that are known to hold outliers."""

    def __init__(self, database: Database, registry: CollectorRegistry, base_rates: Mapping[str, float]) -> None:
        self.alarms, self._gauges, self._base_rates = Alarms(database), AlarmGauges(registry), dict(base_rates)

    def in_force(self, served: Served) -> None:
        """Hold what this version judges under this policy against its calibration."""
        calibration, rank = served.detector.calibration, served.policy.rank(served.detector)
        of_source = {name: tolerated_rate(calibration, rank, rate) for name, rate in self._base_rates.items()}
        watched = () if served.detector.ranked_anew else served.detector.watched
        watch = Watch(served.detector.reference(), watched, tolerated_rate(calibration, rank), of_source)
        self.alarms.in_force(served.name, served.version, served.policy.revision, watch)

    def refresh(self) -> None:
        """Show how the alarms stand, whichever process saw what."""
        self._gauges.show(self.alarms.rows())
