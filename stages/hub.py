"""Files of a Hugging Face Hub repository at a pinned commit, through huggingface_hub; the only module that goes there.

`HF_ENDPOINT` and the proxy variables hold as everywhere; a token comes from `HF_TOKEN` alone and is written nowhere. What
arrived whole before a download broke off is kept in `.dvc/tmp`, and everything is checked against the Hub's own hashes.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages import InputError

DOWNLOADS = Path(".dvc/tmp/downloads")


@contextmanager
def online() -> Iterator[str | bool]:
    """Let the Hub's client reach the network, for the time of a `with` block; yields the token to use, or False."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "0", False
    try:
        yield os.environ.get("HF_TOKEN") or False
    finally:
        os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True


@contextmanager
def downloaded(repo: str, repo_type: str, revision: str, files: list[str]) -> Iterator[Path]:
    """Yield a folder with the files of `repo` that match the patterns in `files`, checked; it is gone afterwards.

    Raises:
        InputError: the Hub cannot be reached, refuses, has no such commit or files, or a file is not what it should be.
    """
    wanted = f"{repo_type} {repo} {revision} {files}"
    folder = DOWNLOADS / f"{repo.replace('/', '--')}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {repo} at {revision[:12]} from the Hub", flush=True)
    with online() as token, explained(repo, revision):
        fetch(repo, repo_type, revision, files, token, folder)
    yield folder
    shutil.rmtree(folder)


def fetch(repo: str, repo_type: str, revision: str, files: list[str], token: str | bool, folder: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=files, local_dir=folder, token=token)
    found = HfApi(token=token).verify_repo_checksums(repo, repo_type=repo_type, revision=revision, local_dir=folder, token=token)
    for mismatch in found.mismatches:
        (folder / mismatch["path"]).unlink()
    if found.mismatches:
        first = found.mismatches[0]
        raise InputError(
            f"{repo} at {revision}: {first['path']}: {first['algorithm']} is {first['actual']}, expected {first['expected']}; "
            "it was removed: `dvc repro` downloads it again"
        )
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    for pattern in files:
        if not list(filter_repo_objects(names, allow_patterns=pattern)):
            raise InputError(f"{repo} at {revision}: no file matches {pattern!r}; correct `files` in params.yaml")


@contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """Turn the client's errors into one message that says what to do."""
    from httpx2 import ConnectError, HTTPError, TimeoutException
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repo} at {revision}"
    try:
        yield
    except RevisionNotFoundError as error:
        raise InputError(f"{what}: the repository has no such commit; correct `revision` in params.yaml") from error
    except GatedRepoError as error:
        raise InputError(
            f"{what}: the repository is gated; accept its terms on its page, make a token at {endpoint()}/settings/tokens "
            "and set it in the environment as HF_TOKEN (it is written nowhere)"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{what}: no such repository, or a private one; correct `repo`, or set HF_TOKEN in the environment") from error
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise InputError(f"{what}: no file matches `files` ({reason(error)}); correct `files` in params.yaml") from error
        raise unanswered(what, error.__cause__ or error) from error
    except (HfHubHTTPError, ConnectError, TimeoutException) as error:
        raise unanswered(what, error) from error
    except (HTTPError, OSError) as error:
        if "No space left" in str(error):
            raise
        raise InputError(f"{what}: the download broke off ({reason(error)}); `dvc repro` goes on with the files that are missing") from error


def unanswered(what: str, error: BaseException) -> InputError:
    """The client has tried several times, with pauses, before it raises one of these."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return InputError(f"{what}: {endpoint()} gave no answer ({reason(error)}); check the network and proxy settings, then `dvc repro`")
    advice = "too many requests: wait a few minutes, or set HF_TOKEN" if error.response.status_code == 429 else "try again later"
    return InputError(f"{what}: {endpoint()} answered {error.response.status_code} ({advice}); then `dvc repro`")


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def commit_of(repo: str, repo_type: str, revision: str) -> str | None:
    """The commit that a branch or tag points to now; None if the Hub cannot say."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with online() as token:
        try:
            return HfApi(token=token).repo_info(repo, repo_type=repo_type, revision=revision, timeout=5).sha
        except (HfHubHTTPError, HTTPError, OSError, ValueError):
            return None
