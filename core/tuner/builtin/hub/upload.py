"""One upload, in a process of its own: ``python -m tuner.builtin.hub.upload``.

Standard input: one line of JSON, ``repository``, ``private``, ``message`` and ``files`` ([path there, path here]).
Standard output: lines of JSON, each with ``event``: ``begun``, ``sending`` (``bytes`` to come), ``sent``, ``kept`` (a
file that is not ours to overwrite), and last ``done`` (``address``) or ``failed`` (``why``; ``final`` where another
attempt cannot help). It ends when standard input is closed: with the run that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MARK = "<!-- This card is written by tuner, anew with every upload. Remove this line to keep your own words. -->"
"""In a model card of ours: one without it is a person's."""
CARD = "README.md"
PLACEHOLDER = "THIS_REPOSITORY"
"""In a card, where the repository's name goes."""
AGAIN = (408, 409, 412, 425, 429)
"""Statuses of the 400s that another attempt may mend."""
NICENESS = 10


def main() -> None:
    """Read the order, carry it out, and say what came of it."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.nice(NICENESS)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    try:
        _say("done", **upload(order))
    except Exception as error:
        _say("failed", why=reason(error), final=is_final(error))
    sys.stdout.flush()
    os._exit(0)  # threads of the library may still wait for an answer


def upload(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out an order; returns ``address`` of the commit. Raises whatever the hub's library raises."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError

    if get_token() is None:
        raise LocalTokenNotFoundError("there is no token on this machine")
    api = HfApi()
    made = api.create_repo(order["repository"], private=order["private"], exist_ok=True)
    _say("begun", repository=str(made))
    additions = []
    for name, path in order["files"]:
        if name == CARD and not _is_ours(api, made.repo_id):
            _say("kept", path=name)
            continue
        size = Path(path).stat().st_size
        _say("sending", bytes=size)
        content = _named(Path(path), made.repo_id) if name == CARD else path
        addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        _send(api, made.repo_id, addition)
        _say("sent", sent=size)
        additions.append(addition)
    commit = api.create_commit(made.repo_id, additions, commit_message=order["message"])
    return {"address": str(commit.commit_url)}


def _send(api: HfApi, repository: str, addition: CommitOperationAdd) -> None:
    """Send a large file's content, unless the hub has it; that of a small one goes with the commit."""
    api.preupload_lfs_files(repository, [addition], num_threads=1, free_memory=False)


def _named(card: Path, repository: str) -> bytes:
    """The card with the repository's name, which is known only now where no owner was given."""
    return card.read_text(encoding="utf-8").replace(PLACEHOLDER, repository).encode()


def _is_ours(api: HfApi, repository: str) -> bool:
    """Whether the repository has no model card yet, or one that we wrote, as the hub makes none by itself."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = api.hf_hub_download(repository, CARD)
    except EntryNotFoundError:
        return True
    return MARK in Path(path).read_text(encoding="utf-8", errors="replace")


def is_final(error: Exception) -> bool:
    """Whether another attempt would end the same: no login, no right, a name that is taken, a file that is gone."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HFValidationError | LocalTokenNotFoundError | OfflineModeIsEnabled | FileNotFoundError):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in AGAIN


def reason(error: Exception) -> str:
    """An error in a line, without the login, and with what to do where that is known."""
    from huggingface_hub import get_token

    said = " ".join(str(error).split()) or type(error).__name__
    if token := get_token():
        said = said.replace(token, "***")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return f"nobody is logged in, or the login is no longer good: `hf auth login` ({said[:200]})"
    if status == 403:
        return f"this login may not write there: it needs a token with the right to write ({said[:200]})"
    return said[:300]


def _say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def _end_with_the_run() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
