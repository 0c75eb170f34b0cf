"""Uploads a model folder to the Hugging Face Hub, after checking it; a card that was edited by hand is kept.

Needs no torch. The token is huggingface_hub's own (``hf auth login``, ``HF_TOKEN``); it goes only into its requests and
never into a message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.card import CardSettings, card_is_ours, card_problems, write_card
from dinokit.errors import ModelError, UsageError
from dinokit.export.variants import differences_in_folder, size_in_name
from dinokit.files.checksums import sha256_of
from dinokit.files.json_files import read_json
from dinokit.loading.hub import check_repository_name, connection_broke
from dinokit.model_folder.config import TIMM_FILE, TRANSFORMERS_FILE
from dinokit.model_folder.contract import contract_of, missing_data_file
from dinokit.model_folder.folder import (
    CARD_FILE,
    CONFIG_FILE,
    RECORD_FILE,
    ModelFolder,
    find_model_folder,
    read_model_folder,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["PushPlan", "PushResult", "plan_push", "push_to_hub"]

_REPORT = "export_report.json"
_MADE_FROM_WEIGHTS = {TRANSFORMERS_FILE, RECORD_FILE, "evaluation.json", _REPORT}
_FIGURES = {"figures/attention.png", "figures/figures.json", "figures/neighbours.png"}
_LARGE = 2**26  # the Hub stores files of this size in git-lfs
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class PushPlan:
    """What would be sent, determined without contacting the Hub."""

    folder: ModelFolder
    repo_id: str
    files: dict[str, int]
    """Path in the repository to size in bytes, sorted."""
    left_out: tuple[str, ...]
    """Files of the folder that are not sent: hidden ones, pickles (unsafe to open), and links out of the folder."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "repo_id": self.repo_id,
            "folder": str(self.folder.path),
            "files": self.files,
            "bytes": sum(self.files.values()),
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class PushResult:
    """The result of a push."""

    plan: PushPlan
    url: str
    """The repository's page."""
    commit: str
    commit_url: str
    pull_request_url: str | None
    card: str
    """``sent``, ``same`` (the Hub already has it) or ``kept`` (the one on the Hub was edited by hand)."""
    removed: tuple[str, ...]
    """Files removed from the Hub because they belonged to the old weights."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **self.plan.to_json(),
            "url": self.url,
            "commit": self.commit,
            "commit_url": self.commit_url,
            "pull_request_url": self.pull_request_url,
            "card": self.card,
            "removed": list(self.removed),
        }


def plan_push(folder: str | Path, repo_id: str) -> PushPlan:
    """Checks a model folder, its card and the repository name, without contacting the Hub.

    Args:
        folder: a model folder, or a run folder (then its ``model/``).
        repo_id: ``user/name`` or ``organisation/name``.

    Raises:
        UsageError: ``repo_id`` is not a valid repository name.
        ModelError: the folder is incomplete, an ONNX file belongs to other weights or changed since it was verified, or
            the Hub would not accept the card; the message lists all problems.
    """
    check_repository_name(repo_id)
    path = Path(folder).expanduser()
    path = find_model_folder(path) or path
    model = read_model_folder(path)
    problems = [*_onnx_problems(model), *_changed_files(path), *_card_problems(model)]
    if problems:
        raise ModelError(f"{path} cannot be pushed: " + "; ".join(problems))
    files, left_out = _files(path)
    return PushPlan(model, repo_id, files, left_out)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    overwrite_card: bool = False,
) -> PushResult:
    """Uploads a model folder to a repository on the Hub, which is created if it does not exist.

    It makes one commit. ONNX files on the Hub that belong to other weights and are not replaced are removed, since the
    model could not be loaded with them; all other files stay. To resume an interrupted push, call it again: files that
    the Hub already has are not sent twice. A README.md on the Hub counts as edited by hand, and is kept, if it is
    neither this folder's nor the one that dinokit wrote for the model there.

    Args:
        folder: a model folder, or a run folder (then its ``model/``). It is checked first (:func:`plan_push`).
        repo_id: ``user/name`` or ``organisation/name``.
        private: create the repository as private. If it exists and is public, nothing is sent.
        revision: branch to commit to, created if missing; the default branch when None.
        create_pr: open a pull request instead of committing.
        message: commit message.
        overwrite_card: also replace a README.md on the Hub that was edited by hand.

    Raises:
        UsageError: the name is invalid, or both ``revision`` and ``create_pr`` are given.
        ModelError: the folder failed its check, offline mode is on, the token is missing, invalid or without write
            access, the network failed, or the Hub refused.
    """
    if revision is not None and create_pr:
        raise UsageError(
            "revision and create_pr cannot be combined: a pull request has a branch of its own; leave one out"
        )
    plan = plan_push(folder, repo_id)
    _check_login()
    if _name_repository(plan):
        plan = plan_push(folder, repo_id)

    from huggingface_hub import HfApi

    api = HfApi(library_name="dinokit")
    with _errors_in_words(repo_id):
        # private=None leaves the visibility of a repository that exists, and the owner's default, alone
        url = str(api.create_repo(repo_id, private=True if private else None, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise ModelError(
                f"{repo_id} exists and is public, but --private was given; nothing was sent. "
                "Change its visibility in its settings on the Hub, or choose another name"
            )
        if revision is not None and not revision.startswith("refs/"):  # an open pull request has its branch
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # The commit names this parent, so it fails if the card changes after it was compared.
        parent = api.repo_info(repo_id, revision=revision).sha
        card = _card_verdict(api, plan, parent)
        send = not (card == "kept" and not overwrite_card)
        removed = _outdated(api, plan, parent, figures=send)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=plan.folder.path,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
            commit_message=message or f"{plan.folder.config.name}, pushed with dinokit",
            allow_patterns=[escape(name) for name in plan.files if send or name != CARD_FILE],
            delete_patterns=[escape(name) for name in removed] or None,
        )
    return PushResult(
        plan=plan,
        url=url,
        commit=commit.oid,
        commit_url=commit.commit_url,
        pull_request_url=commit.pr_url,
        card="sent" if send and card != "same" else card,
        removed=removed,
    )


# -- what is sent


def _onnx_problems(model: ModelFolder) -> Iterator[str]:
    for path in sorted(model.path.glob("onnx/*.onnx")):
        try:
            found = contract_of(path)
        except ModelError as error:
            if path == model.onnx_path:  # a file with another name may come from another tool
                yield str(error)
            continue
        try:
            missing = missing_data_file(path)
        except ModelError as error:
            yield str(error)
            continue
        if missing:
            yield f"{path.name} has its weights in {missing.name}, which is missing; export the folder again"
        if wrong := differences_in_folder(path, found, model):
            yield (
                f"{path.name} and the folder differ in {', '.join(wrong)}; export it again with "
                f"`dinokit export {model.path} -o {model.path}`"
            )


def _changed_files(folder: Path) -> Iterator[str]:
    """Files that changed since export_report.json was written, which makes the report false."""
    try:
        variants = read_json(folder / _REPORT)["variants"]
        told = {
            str(file["file"]): file["sha256"]
            for variant in variants
            for file in (variant, variant.get("data"))
            if file
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # missing, or unreadable, which the card ignores too
    for name, sha256 in told.items():
        if (folder / name).is_file() and sha256_of(folder / name) != sha256:
            yield (
                f"{name} does not match its checksum in {_REPORT}: it is damaged or was changed since; export "
                "the folder again"
            )


def _card_problems(model: ModelFolder) -> Iterator[str]:
    """What the Hub would reject or misread in the card."""
    card = model.path / CARD_FILE
    if not card.is_file():
        yield f"{CARD_FILE} is missing; a repository needs a card (`dinokit card {model.path}` writes one)"
        return
    try:
        text = card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        yield f"{CARD_FILE} is not UTF-8 text ({error.reason})"
        return
    yield from card_problems(text, model.config.licence)


def _name_repository(plan: PushPlan) -> bool:
    """Puts the repository name into the snippets if dinokit wrote the card; returns whether it changed."""
    path = plan.folder.path
    settings = CardSettings.of((path / CARD_FILE).read_text(encoding="utf-8"))
    if settings is None or settings.repo == plan.repo_id or not card_is_ours(path):
        return False
    try:
        write_card(path, settings=replace(settings, repo=plan.repo_id))
    except OSError:  # a read-only folder is pushed as it is
        return False
    return True


def _files(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    files: dict[str, int] = {}
    left_out = []
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(path)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if hidden or _leads_outside(file, path) or file.suffix.lower() in _PICKLES:
            left_out.append(name.as_posix())
        else:
            files[name.as_posix()] = file.stat().st_size
    return files, tuple(left_out)


def _leads_outside(file: Path, folder: Path) -> bool:
    """Whether a file is a link out of the folder; links of the Hub's cache to its own blobs do not count."""
    cache = folder.resolve().parent.parent / "blobs"  # …/models--USER--NAME/snapshots/COMMIT
    there = file.resolve()
    return not (there.is_relative_to(folder.resolve()) or there.is_relative_to(cache))


# -- what is on the Hub


def _outdated(api: HfApi, plan: PushPlan, commit: str | None, *, figures: bool) -> tuple[str, ...]:
    """Files on the Hub made from other weights than ours and not replaced by this push.

    With the same weights but other preprocessing (another default size), only the ONNX files that follow it.
    ``figures``: include the card's figures, which a card edited by hand may still show.
    """
    there = api.list_repo_files(plan.repo_id, revision=commit)
    ours = _MADE_FROM_WEIGHTS | (_FIGURES if figures else set())
    made = [name for name in there if name.startswith("onnx/") or name in ours]
    made = [name for name in made if name not in plan.files]
    if not made or TIMM_FILE not in there or not _same_weights(api, plan, commit):
        return tuple(made)
    if _same_pixels(api, plan, commit):
        return ()
    graphs = [name for name in made if name.endswith(".onnx") and size_in_name(name) is None]
    return tuple(name for name in made if name.removesuffix("_data") in graphs)


def _same_pixels(api: HfApi, plan: PushPlan, commit: str | None) -> bool:
    """Whether dinokit's part of the Hub's config.json, if any, has our architecture and preprocessing."""
    config = plan.folder.config
    right = {"architecture": config.architecture.to_json(), "preprocessing": config.preprocessing.to_json()}
    try:
        theirs = json.loads(_remote_bytes(api, plan.repo_id, CONFIG_FILE, commit) or b"")["dinokit"]
        return all(theirs[key] == json.loads(json.dumps(value)) for key, value in right.items())
    except (ValueError, KeyError, TypeError):
        return True  # not dinokit's: nothing is known of it


def _same_weights(api: HfApi, plan: PushPlan, commit: str | None) -> bool:
    """Whether the Hub's timm.safetensors is ours, by its ETag: SHA-256 for a large file, git's SHA-1 for a small."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(plan.repo_id, TIMM_FILE, revision=commit, endpoint=api.endpoint)
    etag = api.get_hf_file_metadata(url=url).etag
    if etag == plan.folder.weights_sha256:
        return True
    if plan.files[TIMM_FILE] >= _LARGE:
        return False
    data = (plan.folder.path / TIMM_FILE).read_bytes()
    return etag == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card_verdict(api: HfApi, plan: PushPlan, commit: str | None) -> str:
    """``new``, ``same``, ``ours`` (dinokit wrote it, so it may be replaced) or ``kept``."""
    theirs = _remote_bytes(api, plan.repo_id, CARD_FILE, commit)
    if theirs is None:
        return "new"
    if theirs == (plan.folder.path / CARD_FILE).read_bytes():
        return "same"
    config = _remote_bytes(api, plan.repo_id, CONFIG_FILE, commit)
    try:
        written = json.loads(config or b"")["dinokit"]["card_sha256"]
    except (ValueError, KeyError, TypeError):
        return "kept"
    return "ours" if written == hashlib.sha256(theirs).hexdigest() else "kept"


def _remote_bytes(api: HfApi, repo_id: str, name: str, commit: str | None) -> bytes | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, name, revision=commit)).read_bytes()
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # neither cached nor reachable: unknown, not absent
            raise
        return None


# -- errors


def _check_login() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            "nothing was pushed: HF_HUB_OFFLINE forbids access to the Hub. Unset it, or use --dry-run to see "
            "what would be sent"
        )
    if get_token() is None:
        raise ModelError(
            "nothing was pushed: no Hub token was found. Log in with `hf auth login` or set HF_TOKEN to "
            "a token with write access"
        )


@contextmanager
def _errors_in_words(repo_id: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (ModelError, UsageError):
        raise
    except errors.HfHubHTTPError as error:
        # Not the server's whole answer: a proxy may quote the request, with the token, in it.
        status = getattr(error.response, "status_code", 0)
        raise ModelError(_refusal(status, repo_id)) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(_unreachable(repo_id)) from error
    except Exception as error:
        if connection_broke(error):
            raise ModelError(_unreachable(repo_id)) from error
        if isinstance(error, ValueError):  # the Hub's own check of the card's YAML, made before the commit
            raise ModelError(f"the Hub does not accept the card of {repo_id}: {error}") from error
        if isinstance(error, OSError):
            raise ModelError(
                f"a file could not be read or stored while pushing to {repo_id}: {error}"
            ) from error
        raise


def _unreachable(repo_id: str) -> str:
    return (
        f"the Hub cannot be reached, or the connection broke, while pushing to {repo_id}. Check the "
        "network (and HF_ENDPOINT, if set) and run the same command again: files that arrived are not sent again"
    )


def _refusal(status: int, repo_id: str) -> str:
    owner = repo_id.split("/")[0]
    if status == 401:
        return (
            "the Hub does not know this token (401): it is mistyped, revoked or for another endpoint. Log in again "
            "with `hf auth login`, or set HF_TOKEN to a valid one"
        )
    if status == 403:
        return (
            f"this token may not write to {repo_id} (403). Use a token with write access, of {owner} or a member of "
            f"{owner}; --create-pr opens a pull request on an existing repository instead"
        )
    if status == 404:
        return f"the Hub cannot find {repo_id} (404): the user or organisation {owner} or the branch does not exist"
    if status in (409, 412):
        return (
            f"{repo_id} changed during the push ({status}); nothing was committed, run the same command again"
        )
    if status == 413:
        return f"the Hub rejected the push to {repo_id} as too large ({status}); push fewer or smaller files"
    return f"the Hub answered the push to {repo_id} with {status or 'no status'}; try again later"
