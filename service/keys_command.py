"""The `keys` command: make, list and remove the keys of a service."""

from datetime import UTC, datetime
from pathlib import Path

import typer


def keys_command(
    path: Path,
    add: str | None = None,
    role: str = "score",
    source: str | None = None,
    days: float | None = None,
    remove: str | None = None,
) -> None:
    """Add a key for `add` and show it once, remove that with the id `remove`, and list what is then in the file."""
    from anomaly_vae import ConfigError
    from service.keys import KeyFile, Role, made

    file = KeyFile.of(path) if path.exists() else KeyFile()
    if role.upper() not in Role.__members__:
        raise ConfigError(f"--role {role}: use {', '.join(each.name.lower() for each in Role)}")
    if days is not None and not days > 0:
        raise ConfigError(f"--days {days:g}: give a number above 0, or leave it out for a key without end")
    if remove is not None and all(key.id != remove for key in file.keys):
        known = ", ".join(f"{key.id} ({key.name})" for key in file.keys) or "none"
        raise ConfigError(f"--remove {remove}: there is no such key in {path}; there are {known}")
    kept = tuple(key for key in file.keys if key.id != remove)
    shown = None
    if add is not None:
        key, shown = made(add, Role[role.upper()], source, days)
        kept = (*kept, key)
    if kept != file.keys:
        file = KeyFile(keys=kept)
        file.write(path)
    now = datetime.now(UTC)
    for key in file.keys:
        ends = f"until {key.expires:%Y-%m-%d %H:%M} UTC" if key.expires else "without end"
        where = f"  source {key.source}" if key.source else ""
        typer.echo(f"{key.id}  {key.role.name.lower():5}  {key.name}  {'ended' if key.expired(now) else ends}{where}")
    if not file.keys:
        typer.echo(f"no keys in {path}; make one with --add NAME")
    if shown is not None:
        typer.echo(f"\nnew key, shown this once: {shown}")
