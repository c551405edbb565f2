"""Every error a user can cause, and the ones that are nobody's fault.

A message is one line: what is wrong, with the name of the thing, and what to do about it.
They are caught once, at the edge: the CLI prints the line and exits with `exit_code`, the service answers JSON.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomaly_vae.answers import Unscored


class AnomalyVaeError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 2


class ConfigError(AnomalyVaeError):
    """A configuration or an option says something impossible; the message names the field."""


class DataError(AnomalyVaeError):
    """A folder, manifest or data set cannot be used as it is."""


class BadImage(AnomalyVaeError):
    """Bytes that are no usable picture.

    `code` is stable and meant for machines, such as `truncated` or `too_many_pixels`; `images.BAD_IMAGE_CODES`
    lists them.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CalibrationError(AnomalyVaeError):
    """The calibration images cannot support what is asked; the message says how many it would take."""


class BundleError(AnomalyVaeError):
    """A bundle is missing, damaged, or of a format this version does not know."""


class TrainingError(AnomalyVaeError):
    """Training went wrong (a loss that is not a number, say) although the settings are legal."""

    exit_code = 1


class ClusterError(AnomalyVaeError):
    """A cluster cannot be reached, or lost more than it can make good; what was done so far is kept."""

    exit_code = 1


class ServiceError(AnomalyVaeError):
    """A service refused, or gave no answer; raised by `Client`.

    `code` is stable and meant for machines, `message` for people. `status` (HTTP) is None where no answer came, and
    200 where one broke off. `retry_after`: seconds after which it may work. `results`: where several pictures were
    sent and none could be scored, why each.
    """

    exit_code = 1

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        request_id: str | None = None,
        *,
        retry_after: float | None = None,
        results: "Sequence[Unscored]" = (),
    ) -> None:
        super().__init__(f"{message} [{code}{f', request {request_id}' if request_id else ''}]")
        self.code, self.message, self.status, self.request_id = code, message, status, request_id
        self.retry_after, self.results = retry_after, tuple(results)
