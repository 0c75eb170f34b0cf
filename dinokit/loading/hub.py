"""Files from the Hugging Face Hub: cached, offline on request, with errors that say what to do.

huggingface_hub reads the environment itself: ``HF_HOME`` or ``HF_HUB_CACHE`` (where), ``HF_HUB_OFFLINE``,
``HF_ENDPOINT`` (a mirror), ``HF_TOKEN``. It is imported only when a file is needed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from dinokit.errors import ModelError, UsageError
from dinokit.model_folder.contract import missing_data_file

__all__ = [
    "cached_file",
    "check_repository_name",
    "commit_of",
    "connection_broke",
    "hub_file",
    "is_there",
    "optional_hub_file",
    "optional_onnx_file",
]


def connection_broke(error: BaseException) -> bool:
    """Whether the HTTP library raised the error; which library that is depends on huggingface_hub's version.

    Those of requests (huggingface_hub before 1.0) are OSErrors, some of them also ValueErrors.
    """
    libraries = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in libraries


def check_repository_name(name: str, *, option: str = "", needs_owner: bool = True) -> None:
    """Checks the form of a name on the Hub; sends no request.

    Args:
        name: ``user/name`` or ``organisation/name``.
        option: the option that gave the name, for the message.
        needs_owner: False also accepts a bare name, as old data sets have.

    Raises:
        UsageError: the name is not valid.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not declared

    given = f"{option} {name!r}".lstrip()
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{given} is not a valid repository name; expected user/name ({error})") from error
    if needs_owner and "/" not in name:
        raise UsageError(f"{given} does not name its owner; expected user/name, for instance me/{name}")


def hub_file(repo: str, filename: str, *, revision: str | None = None) -> Path:
    """One file of a repository, from the cache or fetched into it.

    Args:
        repo: ``user/model``.
        filename: path inside it.
        revision: branch, tag or commit; the default branch when None.

    Raises:
        UsageError: ``repo`` cannot be a Hub id.
        ModelError: there is no such repository, revision or file, access needs a login, or the network is down.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    at = f"{repo}@{revision}" if revision else repo
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, library_name="dinokit"))
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} cannot be a Hub id; expected user/model ({error})") from error
    except errors.GatedRepoError as error:  # a kind of RepositoryNotFoundError, so it comes first
        raise ModelError(
            f"{at} is gated: its owner requires you to accept its terms. Do that on its page on the Hub, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hub has no repository {repo}, or it is private and you are not logged in. Check the "
            "spelling; for a private one use `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{repo} has no revision {revision!r}; expected one of its branches, tags or commits"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{filename} of {at} is not in the cache, and HF_HUB_OFFLINE (--offline) forbids fetching "
                "it. Load the model once without that, while online"
            ) from error
        raise ModelError(
            f"{filename} of {at} is not in the cache and the Hub cannot be reached. Check the network "
            "(behind a mirror set HF_ENDPOINT) and try again; dinokit's own model `starter` needs no network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{at} has no file {filename}; it is not a model that dinokit can read") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise ModelError(f"the Hub answered {status} for {filename} of {at}; try again later") from error
    except Exception as error:
        if isinstance(error, OSError) and not connection_broke(
            error
        ):  # a full disk, a cache that cannot be written
            raise ModelError(_not_stored(error, filename, at)) from error
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            raise ModelError(
                f"HF_ENDPOINT={constants.ENDPOINT} is not an address; expected one such as https://huggingface.co"
            ) from error
        raise ModelError(
            f"fetching {filename} of {at} broke off ({type(error).__name__}); run it again"
        ) from error


def _not_stored(error: OSError, filename: str, at: str) -> str:
    what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return (
        f"{filename} of {at} could not be stored in the Hub's cache ({what}); set HF_HOME to a folder that can "
        "be written and has room"
    )


def is_there(error: ModelError) -> bool:
    """Whether the repository of a failed :func:`hub_file` exists on the Hub, so that it is not a misspelt path."""
    from huggingface_hub import errors

    cause = error.__cause__
    # Some of these are kinds of OSError, which otherwise tells of the cache.
    if isinstance(cause, errors.HfHubHTTPError | errors.LocalEntryNotFoundError):
        return isinstance(cause, errors.GatedRepoError | errors.RevisionNotFoundError)
    return isinstance(cause, OSError) and not connection_broke(cause)


def optional_hub_file(repo: str, filename: str, *, revision: str | None = None) -> Path | None:
    """As :func:`hub_file`, or None if the repository has no such file (or the cache has none, offline)."""
    from huggingface_hub import constants, errors

    try:
        return hub_file(repo, filename, revision=revision)
    except ModelError as error:
        # "Not in the cache" is a subclass of "not there", but if only the Hub was unreachable, the file may exist.
        unknown = isinstance(error.__cause__, errors.LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if isinstance(error.__cause__, errors.EntryNotFoundError) and not unknown:
            return None
        raise


def optional_onnx_file(repo: str, filename: str, *, revision: str | None = None) -> Path | None:
    """As :func:`optional_hub_file`; if the ONNX file has its weights in a second file, that is fetched too."""
    file = optional_hub_file(repo, filename, revision=revision)
    if file is not None and (data := missing_data_file(file)):
        hub_file(repo, str(PurePosixPath(filename).with_name(data.name)), revision=revision)
    return file


def cached_file(repo: str, filename: str) -> Path | None:
    """The path of a file in the cache, without network access; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename)
    return Path(found) if isinstance(found, str) else None


def commit_of(path: Path) -> str | None:
    """The commit of a cached file (…/snapshots/COMMIT/…)."""
    # The last one, since HF_HOME may contain the word, too.
    _, found, below = path.as_posix().rpartition("/snapshots/")
    return below.partition("/")[0] if found else None
