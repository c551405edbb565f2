"""What is kept of a verdict: its row always, its picture where the settings say so, and which ones chance draws."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from anomaly_vae import content_hash, encode_png
from service.ids import Ids, shown
from service.recorder import Pending, Recorder
from service.served import Served
from service.store import Record
from service.uploads import Upload

if TYPE_CHECKING:
    from torch import Tensor

Images = Literal["none", "outliers", "all"]


class Keeper:
    """Names every verdict, and has it kept where there is a `recorder`.

    `review_share` of the pictures, whatever their verdict, are drawn for review, but for those that the detector was
    made from: to rank among them would promise too much.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        ids: Ids,
        source: str,
        images: Images = "outliers",
        review_share: float = 0.0,
    ) -> None:
        self.recorder, self._ids, self._source = recorder, ids, source
        self._images, self._share = images, review_share
        # Nobody outside can tell what will be drawn.
        self._chance = random.SystemRandom()

    def keep(
        self,
        served: Served,
        row: dict[str, Any],
        image: "Tensor",
        file: Upload,
        request: str,
        source: str | None,
        latents: tuple[float, ...] = (),
    ) -> str:
        """The verdict's id. `row` is as the policy in force has it; `image` is what the model saw of the file."""
        number = self._ids.next()
        if self.recorder is None:
            return shown(number)
        drawn = self._chance.random() < self._share and not served.detector.has_seen(file.data)
        record = Record(
            id=number,
            request=request,
            filename=None if file.name is None else _plain(file.name),
            model=served.name,
            version=served.version,
            source=source or self._source,
            score=row["score"],
            p_value=row["p_value"],
            outlier=row["outlier"],
            alpha=row["alpha"],
            policy=served.policy.revision,
            expected=served.policy.expected_false_alarm_rate,
            parts=row["parts"],
            drawn=drawn,
            latents=latents,
            content=content_hash(file.data) if drawn else None,
        )
        wanted = self._images == "all" or (self._images == "outliers" and (row["outlier"] or drawn))
        self.recorder.put(Pending(record, _drawing(image), image.numel()) if wanted else Pending(record))
        return shown(number)


def _drawing(image: "Tensor") -> Callable[[], bytes]:
    return lambda: encode_png(image.numpy())


def _plain(name: str) -> str:
    """A file name as any database takes it."""
    return name.encode("utf-8", "replace").decode().replace("\0", "\ufffd")[:255]
