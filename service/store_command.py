"""The `store` command: what a store holds, a copy of it while it is in use, and what is to be forgotten."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from service.looking import Look


def store_command(
    place: str,
    backup: Path | None = None,
    forget_before: float | None = None,
    forget_pictures_before: float | None = None,
) -> None:
    """Back up the store at `place`, delete what is older than so many days, and say what is then in it."""
    from anomaly_vae import ConfigError
    from service.looking import Look

    if "://" not in place and not Path(place).is_file():
        raise ConfigError(f"there is no store {place}; `anomaly-vae serve` says at its start where its store is")
    look = Look(place)
    try:
        if backup is not None:
            look.backup(backup)
            typer.echo(f"wrote {backup} ({backup.stat().st_size / 2**20:,.1f} MiB)")
        if forget_before is not None or forget_pictures_before is not None:
            typer.echo(_forgotten(place, forget_before, forget_pictures_before))
        typer.echo(_summary(look))
    finally:
        look.close()


def _forgotten(place: str, days: float | None, picture_days: float | None) -> str:
    """Older verdicts and pictures go, which brings the store up to date."""
    from service.store import Kept, Store

    store = Store(place)
    try:
        kept, now, gone = Kept(days, picture_days, None, None, None), time.time(), 0
        while some := store.tidy(kept, now):
            gone += some
        store.compact()
        return f"forgot {gone:,}{'; a reader keeps the traces in the log until it ends' * store.uncompacted}"
    finally:
        store.close()


def _summary(store: "Look") -> str:
    counts = store.counts()
    since = "none" if counts.oldest is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(counts.oldest))
    return (
        f"{store.database.shown}: {counts.verdicts:,} verdicts since {since} UTC, "
        f"{counts.pictures:,} pictures ({counts.picture_bytes / 2**20:,.1f} MiB), {counts.feedback:,} judged by people"
    )
