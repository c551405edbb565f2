"""Every code that a refusal may carry: its HTTP status, and what to do about it. Codes are stable, messages are not."""

from http import HTTPStatus
from typing import NamedTuple

_BAD, _NOT_FOUND, _CONFLICT = HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT
_LARGE, _TYPE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE
_CONTENT, _MANY = HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.TOO_MANY_REQUESTS
_BUSY, _LATE = HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT


class Code(NamedTuple):
    """`remedy`: what a client does about it."""

    status: HTTPStatus
    remedy: str


CODES: dict[str, Code] = {
    # The request
    "bad_json": Code(_BAD, "Send one JSON object."),
    "bad_parameter": Code(_BAD, "Mend the parameter that the message names."),
    "unknown_parameter": Code(_BAD, "Leave it out, or mend its name; the message lists those that there are."),
    "bad_content_length": Code(_BAD, "Send Content-Length as a number of bytes."),
    "incomplete_body": Code(_BAD, "Send the body again, whole."),
    "slow_body": Code(HTTPStatus.REQUEST_TIMEOUT, "Send the body faster: 16 KiB a second at the least."),
    "bad_deadline": Code(_BAD, "Send X-Deadline-Ms as whole milliseconds from 1 to 600000."),
    "alpha_not_supported": Code(_BAD, "Choose a larger rate, or calibrate with as many normals as the message says."),
    "not_found": Code(_NOT_FOUND, "Mend the address; this page lists them."),
    "method_not_allowed": Code(HTTPStatus.METHOD_NOT_ALLOWED, "Use a method of the header Allow."),
    # Keys
    "no_key": Code(HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Bearer KEY."),
    "bad_key": Code(HTTPStatus.UNAUTHORIZED, "Ask whoever runs the service for a new key."),
    "session_over": Code(HTTPStatus.UNAUTHORIZED, "Sign in again on the page, or send a key."),
    "cross_site": Code(HTTPStatus.FORBIDDEN, "Make keys, and send one; or ask from the service's own pages."),
    "unknown_host": Code(HTTPStatus.FORBIDDEN, "Call the service localhost, or start it with keys or allow_remote."),
    "forbidden": Code(HTTPStatus.FORBIDDEN, "Use a key with the role that the message names."),
    "rate_limited": Code(_MANY, "Wait for Retry-After; the key may make so many requests a second."),
    "too_many_bytes": Code(_MANY, "Wait for earlier answers; the key may have so many bytes in hand."),
    # Pictures
    "empty": Code(_BAD, "Send the bytes of a picture."),
    "bad_multipart": Code(_BAD, "Send the form again, whole."),
    "no_files": Code(_BAD, "Send pictures as files: curl -F file=@part.png."),
    "too_large": Code(_LARGE, "Send fewer or smaller pictures, or raise the limit that the message names."),
    "too_many_images": Code(_LARGE, "Send fewer pictures in a request, or an archive."),
    "too_many_pixels": Code(_LARGE, "Scale the picture down."),
    "unsupported_media_type": Code(_TYPE, "Send image/*, multipart/form-data or an archive."),
    "unsupported_format": Code(_TYPE, "Convert the picture to JPEG or PNG."),
    "unsupported_variant": Code(_CONTENT, "Export the picture as an ordinary JPEG or PNG."),
    "unsupported_depth": Code(_CONTENT, "Export the picture with 8 bits a channel."),
    "not_an_image": Code(_CONTENT, "Send a JPEG, PNG, WebP, BMP, TIFF or GIF file."),
    "truncated": Code(_CONTENT, "Export the picture again and send the whole file."),
    "corrupt": Code(_CONTENT, "Export the picture again and send the whole file."),
    "unscorable": Code(_CONTENT, "Check the picture, or export it again."),
    "no_usable_image": Code(_CONTENT, "Each of the results says why."),
    # Archives
    "bad_archive": Code(_CONTENT, "Make the archive again and send it whole."),
    "empty_archive": Code(_CONTENT, "Put pictures into it."),
    "unsupported_archive": Code(_TYPE, "Make a zip, tar or tar.gz."),
    "bad_entry": Code(_CONTENT, "Mend this entry; the others are not touched by it."),
    "encrypted_entry": Code(_CONTENT, "Make the archive without a password."),
    "too_many_entries": Code(_LARGE, "Split the archive."),
    "expands_too_much": Code(_LARGE, "Split the archive, or send its pictures as they are."),
    "too_many_archives": Code(_MANY, "Wait for Retry-After."),
    "too_many_exports": Code(_MANY, "Wait for Retry-After; others are being read."),
    "no_room": Code(HTTPStatus.INSUFFICIENT_STORAGE, "Try again later, or split the archive."),
    # Load and time
    "queue_full": Code(_MANY, "Wait for Retry-After."),
    "deadline_too_short": Code(_MANY, "Wait for Retry-After, or allow more time."),
    "deadline_exceeded": Code(_LATE, "Try again later, or allow more time."),
    "draining": Code(_BUSY, "Send it again to reach another process."),
    "model_failed": Code(_BUSY, "Try again in a moment; the process restarts."),
    # Models and verdicts
    "unknown_model": Code(_NOT_FOUND, "Use a name that the message lists."),
    "unknown_bundle": Code(_NOT_FOUND, "Use a name of GET /v1/models, or put the bundle into the models folder."),
    "bad_bundle": Code(_CONTENT, "Make the bundle again, or copy it again, whole."),
    "no_models_folder": Code(_CONFLICT, "Start the service with -o models=FOLDER."),
    "no_store": Code(_CONFLICT, "Start the service with -o store=PATH."),
    "not_loaded": Code(_CONFLICT, "Load its bundle first."),
    "no_memory": Code(HTTPStatus.INSUFFICIENT_STORAGE, "Retire a version that is not needed, or use a larger machine."),
    "load_timeout": Code(_LATE, "Repeat the request later: what is loaded by then is not loaded again."),
    "loading": Code(_BUSY, "Wait until the bundle before is loaded, which the message names."),
    "in_use": Code(_CONFLICT, "Activate another version, or name another model, first."),
    "not_independent": Code(_CONFLICT, "Say independent, if that is so, or set the mode average first."),
    "nothing_before": Code(_CONFLICT, "There is nothing to go back to."),
    "policy_not_supported": Code(_CONFLICT, "Change the policy first, or use a bundle with more normals."),
    "conflict": Code(_CONFLICT, "Somebody else was quicker: look again and repeat the request."),
    "bundle_replaced": Code(_CONFLICT, "Put the bundle that the message names back into its folder."),
    "cannot_explain": Code(_CONFLICT, "Train the bundle again with this version."),
    "too_few_reviewed": Code(_CONFLICT, "Review more pictures (GET /v1/review)."),
    "contradiction": Code(_CONFLICT, "Use a label that fits the verdict; the message lists them."),
    "unknown_verdict": Code(_NOT_FOUND, "Look again in a moment, or at GET /v1/verdicts."),
    "no_picture": Code(_NOT_FOUND, "Have more pictures kept: settings images, picture_days, review_share."),
    "unknown_alarm": Code(_NOT_FOUND, "Use an id of GET /v1/alarms."),
    "not_raised": Code(_CONFLICT, "There is nothing to do."),
    "unknown_scan": Code(_NOT_FOUND, "Use an id of GET /v1/scans."),
    "no_report": Code(_NOT_FOUND, "Send one: PUT /v1/scans/ID/report."),
    "not_yours": Code(HTTPStatus.FORBIDDEN, "Use the key that the message names, or one with the role admin."),
    "bad_rows": Code(_BAD, "Mend the row that the message names: lines of a result of scan, as .ndjson has them."),
    "too_many_rows": Code(_LARGE, "Send fewer rows at a time."),
    "rows_missing": Code(_CONFLICT, "Send the rows from the place on that the message names."),
    "version_gone": Code(HTTPStatus.GONE, "Load the bundle that made the verdict."),
    "store_down": Code(_BUSY, "Wait until /ready says that the store is back."),
    # The service
    "internal": Code(HTTPStatus.INTERNAL_SERVER_ERROR, "Tell whoever runs the service the request id."),
}  # fmt: skip
"""By the order in which a reader meets them."""

FOR_THE_QUEUE = ("queue_full", "deadline_too_short", "deadline_exceeded", "draining", "model_failed", "unscorable")
FOR_PICTURES = (
    *FOR_THE_QUEUE, "cannot_explain", "empty", "bad_multipart", "no_files", "too_large", "too_many_images",
    "too_many_pixels",
    "unsupported_media_type", "unsupported_format", "unsupported_variant", "unsupported_depth", "not_an_image",
    "truncated", "corrupt", "no_usable_image", "bad_archive", "empty_archive", "unsupported_archive",
    "too_many_entries", "expands_too_much", "too_many_archives", "no_room", "bad_deadline", "alpha_not_supported",
    "unknown_model", "bad_content_length", "incomplete_body",
)  # fmt: skip
FOR_KEYS = ("no_key", "bad_key", "session_over", "forbidden", "cross_site", "rate_limited", "too_many_bytes")
FOR_QUERIES = ("bad_parameter", "unknown_parameter")
FOR_BODIES = ("bad_json", "bad_parameter", "too_large", "bad_content_length", "incomplete_body")
