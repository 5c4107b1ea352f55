"""Posting what happens to an address: a Discord channel, or a program that takes JSON.

Called in the outbox's thread. No message of ours, and no error, has the address in it: whoever knows it can post.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.file_kinds import content_type

if TYPE_CHECKING:
    from tuner.builtin.webhook.settings import Level, Settings

TOGETHER, BYTES = 10, 8 * 2**20
"""Files of one message, and what they may hold together: what Discord takes on any server."""
TEXT = 1900
"""Characters of a message at most; Discord takes 2000."""
TIMEOUT, TRIES = 30.0, 3
"""Seconds for each try; how often a server that is busy, or gone, is asked again."""
BUSY = frozenset({429, 500, 502, 503, 504})
"""Answers after which it is asked again."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for."""
logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)  # its debug lines hold the address


class Webhook:
    """One address."""

    def __init__(self, settings: Settings, run_name: str) -> None:
        self.settings = settings
        self.prefix = settings.message_prefix or run_name

    def post(self, level: Level, event: str, text: str, facts: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        """Post a message, with files in as many parts as they need; nothing where its level is not wanted.

        Raises RuntimeError where the server does not take it.
        """
        if not self.settings.takes(level):
            return
        parts, left_out = _parts(files)
        if left_out:
            text = f"{text} (too large to be posted: {', '.join(path.name for path in left_out)})"
        for number, part in enumerate(parts):
            said = text if number == 0 else f"{text} ({number + 1} of {len(parts)})"
            if self.settings.webhook_type == "discord":
                self._send(fields=dict(self._discord(said, part)))
            else:
                self._send(json=self._raw(level, event, said, facts, part))

    def _discord(self, text: str, files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
        # No mentions: a caption or an error must not call everyone.
        message = {"content": f"[{self.prefix}] {text}"[:TEXT], "allowed_mentions": {"parse": []}}
        yield "payload_json", json.dumps(message)
        for number, path in enumerate(files):
            yield f"files[{number}]", (path.name, path.read_bytes(), content_type(path))

    def _raw(
        self, level: Level, event: str, text: str, facts: Mapping[str, Any], files: Sequence[Path]
    ) -> dict[str, Any]:
        attached = [
            {"name": path.name, "type": content_type(path), "base64": base64.b64encode(path.read_bytes()).decode()}
            for path in files
        ]
        message = {"event": event, "level": level, "prefix": self.prefix, "message": text, **facts}
        return {**message, "files": attached} if attached else message

    def _send(self, **content: Any) -> None:
        for tried in range(TRIES + 1):
            fault, wait = self._try(content)
            if fault is None:
                return
            if wait is None or tried == TRIES:
                raise RuntimeError(fault)
            time.sleep(min(LONGEST_WAIT, max(wait, 0.5 * 2**tried)))

    def _try(self, content: Mapping[str, Any]) -> tuple[str | None, float | None]:
        """Post once: what is wrong, None where it is taken; seconds the server asks to wait, None where it is final."""
        import urllib3

        try:
            # urllib3's own retries read a whole answer, however long, and warn with the address; redirects would hand
            # clips to another server.
            answer = urllib3.request(
                "POST", self.settings.address, timeout=TIMEOUT, retries=False, preload_content=False, **content
            )
        except urllib3.exceptions.HTTPError as error:
            return f"the server cannot be reached ({type(error).__name__})", 0.0
        answer.close()
        if answer.status < 300:
            return None, None
        fault = f"the server answers {answer.status}"
        if answer.status not in BUSY:
            return fault, None
        try:
            return fault, urllib3.Retry().get_retry_after(answer) or 0.0
        except urllib3.exceptions.InvalidHeader:
            return fault, 0.0


def _parts(files: Sequence[Path]) -> tuple[list[list[Path]], list[Path]]:
    """Files by message, at least one, and those that are too large for any."""
    parts: list[list[Path]] = [[]]
    left_out = []
    held = 0
    for path in files:
        size = path.stat().st_size
        if size > BYTES:
            left_out.append(path)
            continue
        if len(parts[-1]) == TOGETHER or held + size > BYTES:
            parts.append([])
            held = 0
        parts[-1].append(path)
        held += size
    return parts, left_out
