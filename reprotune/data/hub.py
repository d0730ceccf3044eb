"""Files of a Hugging Face Hub repository at a pinned commit; the only module that talks to the Hub.

A token comes from `HF_TOKEN` alone and is never written to disk.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reprotune.compat.huggingface_hub import online
from reprotune.errors import InputError, disk_full

DOWNLOADS = Path(".dvc/tmp/downloads")
"""Files that arrived whole before a download broke off; the next one goes on from them."""


@contextmanager
def downloaded(repo: str, repo_type: str, revision: str, files: list[str]) -> Iterator[Path]:
    """Yield a folder with the files of `repo` that match the patterns in `files`; it is removed afterwards.

    Raises:
        InputError: the Hub is unreachable, refuses, lacks the commit or a file, or sends other content.
    """
    request = f"{repo_type} {repo} {revision} {files}"
    folder = DOWNLOADS / f"{repo.replace('/', '--')}-{hashlib.sha256(request.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {repo} at {revision[:12]} from the Hub", flush=True)
    with online() as token, explained(repo, revision):
        fetch(repo, repo_type, revision, files, token, folder)
    yield folder
    shutil.rmtree(folder)


def fetch(
    repo: str, repo_type: str, revision: str, files: list[str], token: str | bool, folder: Path
) -> None:
    """Download into `folder` and check every file against the hash that the Hub lists."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    snapshot_download(
        repo, repo_type=repo_type, revision=revision, allow_patterns=files, local_dir=folder, token=token
    )
    checks = HfApi(token=token).verify_repo_checksums(
        repo, repo_type=repo_type, revision=revision, local_dir=folder, token=token
    )
    for mismatch in checks.mismatches:
        (folder / mismatch["path"]).unlink()
    if checks.mismatches:
        first = checks.mismatches[0]
        raise InputError(
            f"{repo} at {revision}: {first['path']}: {first['algorithm']} is {first['actual']}, "
            f"expected {first['expected']}; it was removed: `dvc repro` downloads it again"
        )
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    for pattern in files:
        if not list(filter_repo_objects(names, allow_patterns=pattern)):
            raise InputError(
                f"{repo} at {revision}: no file matches {pattern!r}; correct `files` in params.yaml"
            )


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
        raise InputError(
            f"{what}: the repository has no such commit; correct `revision` in params.yaml"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"{what}: the repository is gated; accept its terms on its page, make a token at "
            f"{endpoint()}/settings/tokens and set it in the environment as HF_TOKEN (it is written nowhere)"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: no such repository, or a private one; correct `repo`, "
            "or set HF_TOKEN in the environment"
        ) from error
    except LocalEntryNotFoundError as error:
        raise unanswered(what, error.__cause__ or error) from error
    except EntryNotFoundError as error:
        raise InputError(
            f"{what}: no file matches `files` ({reason(error)}); correct `files` in params.yaml"
        ) from error
    except (HfHubHTTPError, ConnectError, TimeoutException) as error:
        raise unanswered(what, error) from error
    except (HTTPError, OSError) as error:
        if disk_full(error):
            raise
        raise InputError(
            f"{what}: the download broke off ({reason(error)}); "
            "`dvc repro` goes on with the files that are missing"
        ) from error


def unanswered(what: str, error: BaseException) -> InputError:
    """The error for a Hub that gives no answer or refuses. The client has already retried, with pauses."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return InputError(
            f"{what}: {endpoint()} gave no answer ({reason(error)}); "
            "check the network and proxy settings, then `dvc repro`"
        )
    status = error.response.status_code
    too_many = "too many requests: wait a few minutes, or set HF_TOKEN"
    advice = too_many if status == 429 else "try again later"
    return InputError(f"{what}: {endpoint()} answered {status} ({advice}); then `dvc repro`")


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
