"""`lingraft push`: an adapter's folder on the Hugging Face hub, looked through before anything is sent."""

import sys
from pathlib import Path
from typing import Any

import click

from lingraft.commands.packing_up import Parcel, parcel_of
from lingraft.commands.terminals import json_text
from lingraft.errors import LingraftError, MissingExtra, TransientError, UserError
from lingraft.escaping import printable


def push_adapter(
    folder: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any] | None:
    """`lingraft push`.

    Args:
        folder: The adapter's folder.
        repository: OWNER/NAME.
        private: Whether a repository that is new is private.
        revision: The branch; None: main.
        message: The commit's.
        dry_run: Whether only to say what would be pushed; the network is not used.
        as_json: Whether the result is returned instead of printed.

    Raises:
        UserError: Something speaks against pushing it, or the hub refuses it.
        TransientError: The hub cannot be reached, or asks to wait.
        MissingExtra: huggingface_hub is not installed.
    """
    parcel = parcel_of(folder, repository)
    result: dict[str, Any] = {
        "repository": repository,
        "revision": revision or "main",
        "private": private,
        "pushed": False,
        **parcel.as_dict(),
    }
    if not as_json:
        _show(parcel, result)
    if dry_run and as_json:
        click.echo(json_text(result, 2))
        sys.exit(UserError.exit_code if parcel.refused else 0)
    if parcel.refused:
        raise UserError(
            f"this is not pushed: {'; '.join(said.what for said in parcel.refused)}",
            where=folder,
            remedy="; ".join(dict.fromkeys(said.remedy for said in parcel.refused)),
        )
    if dry_run:
        return None
    result |= {"pushed": True, **_send(parcel, repository, private, revision, message)}
    if as_json:
        return result
    click.echo(printable(f"pushed: {result['url']}"), err=True)
    return None


def _show(parcel: Parcel, result: dict[str, Any]) -> None:
    """What would be pushed, for people."""
    lines = [
        f"to {result['repository']}, {result['revision']}, {'private' if result['private'] else 'public'} where new"
    ]
    lines += [
        f"  {file.size:>12,}  {file.name}{'  (changed for the hub)' if file.changed else ''}" for file in parcel.files
    ]
    lines += [f"left out: {name}" for name in parcel.left_out]
    if parcel.front:
        lines += ["", "---", parcel.front.rstrip("\n"), "---", ""]
    lines += [f"warning: {said.what}\n  to do: {said.remedy}" for said in parcel.warned]
    lines += [f"refused: {said.what}\n  to do: {said.remedy}" for said in parcel.refused]
    click.echo(printable("\n".join(lines)))


def _send(parcel: Parcel, repository: str, private: bool, revision: str | None, message: str | None) -> dict[str, Any]:
    """Makes the repository where it is not there, and one commit of all files."""
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub") from None
    from lingraft import __version__

    disable_progress_bars()
    api = HfApi(library_name="lingraft", library_version=__version__)
    with _said_of_the_hub(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(file.name, file.content) for file in parcel.files],
            commit_message=message or "Adapter made with lingraft",
            revision=revision,
        )
    return {"commit": commit.oid, "url": str(commit.repo_url)}


class _said_of_the_hub:
    """Turns what goes wrong with the hub into one clear message each; nothing of a request's headers is in it."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, LingraftError) or not isinstance(error, Exception):
            return
        said = _said(error, self.repository)
        if said is not None:
            raise said from error


def _said(error: Exception, repository: str) -> LingraftError | None:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return _no_token(repository)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(
            "huggingface_hub is set to be offline", where=repository, remedy="unset HF_HUB_OFFLINE, or give --dry-run"
        )
    if isinstance(error, errors.HFValidationError):
        return UserError("the hub does not allow this name", where=repository, remedy="give OWNER/NAME")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return _no_token(repository)
    if status == 403:
        return UserError(
            "the token may not write there",
            where=repository,
            remedy="use one with write access to this owner's repositories, or another OWNER",
        )
    if status == 404:
        return UserError(
            "the hub has no such repository or branch, or this token may not see it",
            where=repository,
            remedy="check OWNER/NAME and --revision",
        )
    if status == 429:
        return TransientError(
            "the hub asks to wait: too many requests", where=repository, remedy="give the same command again later"
        )
    if status is not None:
        return TransientError(
            f"the hub answered {status}; nothing was published",
            where=repository,
            remedy="give the same command again later; if it persists, see status.huggingface.co",
        )
    # What carries the requests (requests, httpx) differs from version to version.
    if isinstance(error, (*errors.HfHubHTTPError.__bases__, OSError)):
        return TransientError(
            f"the hub cannot be reached ({type(error).__name__}); nothing was published",
            where=repository,
            remedy="check the connection and give the same command again",
        )
    if isinstance(error, UnicodeEncodeError):  # Of a header.
        return _no_token(repository)
    if isinstance(error, ValueError):  # The hub's library has the card looked at first.
        return UserError(
            f"the hub refuses what would be published: {str(error).strip().splitlines()[-1][:300] if str(error).strip() else ''}",
            where=repository,
            remedy="mend the card's front matter; --dry-run shows it",
        )
    return None


def _no_token(repository: str) -> UserError:
    return UserError(
        "the hub does not know who is asking: there is no token, or it is not valid",
        where=repository,
        remedy="log in with `hf auth login`, or set HF_TOKEN",
    )
