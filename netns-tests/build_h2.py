"""Symbolic frames of the HTTP/2 corpus as bytes; the corpus's runner imports this module by name.

A frame is `{"type", "flags", "stream", "payload_b64" | "headers" | "block_b64", "repeat"}`, a group
`{"group": [frames], "repeat", "stream_step"}`, where each turn adds `stream_step` to the streams.
"""

import base64

from hpack import Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TYPES = {
    "DATA": 0, "HEADERS": 1, "PRIORITY": 2, "RST_STREAM": 3, "SETTINGS": 4, "PUSH_PROMISE": 5,
    "PING": 6, "GOAWAY": 7, "WINDOW_UPDATE": 8, "CONTINUATION": 9,
}  # fmt: skip


def expand(frames) -> bytes:
    """The preface and these frames."""
    encoder = Encoder()
    return PREFACE + b"".join(_entry(entry, encoder) for entry in frames)


def _entry(entry, encoder) -> bytes:
    repeat = entry.get("repeat", 1)
    if "group" not in entry:
        return b"".join(_frame(entry, encoder, 0) for _ in range(repeat))
    return b"".join(
        _frame(frame, encoder, turn * entry.get("stream_step", 0))
        for turn in range(repeat)
        for frame in entry["group"]
    )


def _frame(frame, encoder, step) -> bytes:
    if "headers" in frame:
        payload = encoder.encode([tuple(field) for field in frame["headers"]])
    else:
        payload = base64.b64decode(frame.get("payload_b64") or frame.get("block_b64") or "")
    kind = frame["type"]
    stream = frame.get("stream", 0) + (step if frame.get("stream") else 0)
    return (
        len(payload).to_bytes(3, "big")
        + bytes((TYPES.get(kind, kind), frame.get("flags", 0)))
        + stream.to_bytes(4, "big")
        + payload
    )
