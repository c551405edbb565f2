"""The `keys` command: make, list and remove the keys of a service."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from service.keys import Key


def keys_command(
    path: Path,
    add: str | None = None,
    role: str = "score",
    source: str | None = None,
    days: float | None = None,
    rate: float | None = None,
    megabytes: float | None = None,
    remove: str | None = None,
) -> None:
    """Add a key for `add` and show it once, remove that with the id `remove`, and list what is then in the file."""
    from anomaly_vae import ConfigError
    from service.keys import KeyFile, Role, made

    file = KeyFile.of(path) if path.exists() else KeyFile()
    if role.upper() not in Role.__members__:
        raise ConfigError(f"--role {role}: use {', '.join(each.name.lower() for each in Role)}")
    for option, value in (("--days", days), ("--rate", rate), ("--megabytes", megabytes)):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} {value:g}: give a number above 0, or leave it out for no end")
    if remove is not None and all(key.id != remove for key in file.keys):
        known = ", ".join(f"{key.id} ({key.name})" for key in file.keys) or "none"
        raise ConfigError(f"--remove {remove}: there is no such key in {path}; there are {known}")
    kept = tuple(key for key in file.keys if key.id != remove)
    shown = None
    if add is not None:
        bounds = {
            "requests_per_second": rate,
            "bytes_in_hand": None if megabytes is None else max(1, round(megabytes * 1e6)),
        }
        key, shown = made(add, Role[role.upper()], source, days, **bounds)
        kept = (*kept, key)
    if kept != file.keys:
        file = KeyFile(keys=kept)
        file.write(path)
    now = datetime.now(UTC)
    for key in file.keys:
        typer.echo("  ".join(_told(key, now)))
    if not file.keys:
        typer.echo(f"no keys in {path}; make one with --add NAME")
    if shown is not None:
        typer.echo(f"\nnew key, shown this once: {shown}")


def _told(key: "Key", now: datetime) -> Iterator[str]:
    yield key.id
    yield f"{key.role.name.lower():5}"
    yield key.name
    if key.expires is None:
        yield "without end"
    else:
        yield "ended" if key.expired(now) else f"until {key.expires:%Y-%m-%d %H:%M} UTC"
    if key.source:
        yield f"source {key.source}"
    if key.requests_per_second:
        yield f"{key.requests_per_second:g} requests/s"
    if key.bytes_in_hand:
        yield f"{key.bytes_in_hand / 1e6:g} MB in hand"
