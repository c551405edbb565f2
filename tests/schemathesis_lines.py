"""How Schemathesis sends lines of JSON: as the text that it made up."""

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def as_it_is(_: object, value: object) -> bytes:
    """Not as JSON, which a line of it alone would be."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
