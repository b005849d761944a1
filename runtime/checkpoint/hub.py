"""A checkpoint on the model hub, at one commit. The only module that uses the hub client.

A branch or tag is resolved once, by one request that also lists the files. All files are then of that commit, and are
fetched when needed and not in the client's cache. If the hub cannot be reached or refuses (an outage, an expired
login), only the cache is read, as transformers does: files missing in the snapshot count as missing in the checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from runtime.checkpoint.files import Files

_SECONDS = 4.0  # timeout of connecting and of each read; the client's own calls retry for 24
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@((?!.*\.\.)\w[\w./+-]*))?")
_SHA256 = re.compile("[0-9a-f]{64}")
_CONFIG = "config.json"


def is_hub_id(label: str) -> bool:
    """Whether `label` has the form of a hub id, ORG/NAME or ORG/NAME@REVISION."""
    return _HUB_ID.fullmatch(label) is not None


def at_commit(label: str, commit: str) -> str:
    """The hub id `label` at a commit instead of its branch or tag."""
    return f"{label.partition('@')[0]}@{commit}"


class HubFiles(Files):
    """The files of a hub repository at one commit, kept in the hub client's cache.

    `label` is ORG/NAME, with @REVISION (a branch, tag or commit) unless it is the default branch. Raises `UserError` if
    there is no such repository or revision, or the hub cannot be reached and the cache lacks it.
    """

    def __init__(self, label: str) -> None:
        match = _HUB_ID.fullmatch(label)
        assert match is not None  # the caller checked with `is_hub_id`
        self.label = self.source = label
        self._repository: str = match[1]
        self._revision: str = match[2] or "main"
        self._listing: dict[str, Any] | None = None  # the hub's record of each file, by name; None: cache only
        self._outage: str | None = None  # why only the cache is read
        with self._one_line():
            self._resolve()

    @property
    def name(self) -> str:
        """ORG-NAME."""
        return self._repository.replace("/", "-")

    def names(self) -> list[str]:
        if self._listing is not None:
            return sorted(name for name in self._listing if "/" not in name)
        return sorted(path.name for path in self._snapshot.iterdir())

    def has(self, name: str) -> bool:
        return self._cached(name) is not None if self._listing is None else name in self._listing

    def at_hand(self, name: str) -> bool:
        return self._listing is None or name not in self._listing or self._cached(name) is not None

    def path(self, name: str) -> Path | None:
        if not self.has(name):
            return None
        return self._cached(name) or self._fetch(name)

    def folder(self, names: list[str]) -> Path:
        for name in names:
            self.path(name)
        return self._snapshot

    def sha256(self, name: str) -> str:
        """As in `Files`; for files in Git LFS the hub's or the cache's record of it, without reading the file."""
        stored = None if self._listing is None else getattr(self._listing.get(name), "lfs", None)
        known = getattr(stored, "sha256", None)
        if known is None:  # the cache names files by their etags, which are SHA-256 for LFS
            cached = self._cached(name)
            known = self._etag(name) if cached is None else cached.resolve().name
        return known if known is not None and _SHA256.fullmatch(known) else super().sha256(name)

    def error(self, text: str) -> UserError:
        if self._outage is not None:
            text += f" (the model hub cannot be reached, {self._outage}: only its cache was read)"
        return super().error(text)

    def _resolve(self) -> None:
        """Find the commit and its files: from the hub, else from the cache."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

        try:
            info = HfApi().model_info(
                self._repository, revision=self._revision, files_metadata=True, timeout=_timeout()
            )
        except (HFValidationError, RevisionNotFoundError):
            raise
        except Exception as error:  # of any type: a proxy's own page, for one
            config = self._cached(_CONFIG, self._revision)
            if config is None:
                raise
            self._snapshot, self._outage = config.parent, type(error).__name__
            self.commit = config.parent.name
            return
        self.commit = info.sha
        self._listing = {file.rfilename: file for file in info.siblings or ()}
        config = self.path(_CONFIG)
        if config is None:
            self._snapshot = Path(self._repository)  # a placeholder: no file of it is read
            return
        self._snapshot = config.parent
        self._remember()

    def _cached(self, name: str, revision: str | None = None) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._repository, name, revision=revision or self.commit)
        return Path(found) if isinstance(found, str) else None

    def _etag(self, name: str) -> str | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with self._one_line():
            return get_hf_file_metadata(hf_hub_url(self._repository, name, revision=self.commit)).etag

    def _fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self._one_line():
            return Path(hf_hub_download(self._repository, name, revision=self.commit))

    def _remember(self) -> None:
        """Record the commit of the branch or tag in the cache, as the client does, for later use without the hub."""
        if self._revision == self.commit:
            return
        note = self._snapshot.parent.parent / "refs" / self._revision
        try:
            if not note.is_file() or note.read_text() != self.commit:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(str(self.commit))
        except OSError:  # a read-only cache is used as it is
            logging.getLogger("runtime").debug("cannot write %s", note)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn the hub client's errors into `UserError` of one line, and mute its messages about retries."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        client = logging.getLogger("huggingface_hub")
        level = client.level
        client.setLevel(logging.ERROR)
        try:
            yield
        except UserError:
            raise
        except GatedRepoError as error:
            raise super().error("access to it is restricted; ask for access on the hub and log in") from error
        except RevisionNotFoundError as error:
            what = f"{self._repository} has no revision {self._revision}"
            raise super().error(f"{what}; give a branch, a tag or a full commit after the @") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise super().error(
                "no such local folder, and no such model on the hub; check the name, or log in if it is private"
            ) from error
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            said = type(error).__name__ if status is None else f"it answers {status}"
            raise self._unreachable(said) from error
        except Exception as error:  # see `_resolve`
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise  # an error of the disk
            raise self._unreachable(type(error).__name__) from error
        finally:
            client.setLevel(level)

    def _unreachable(self, why: str) -> UserError:
        return super().error(
            f"no such local folder, and the model hub cannot be reached ({why}) nor is the model in its cache; check "
            "the path or the connection, or leave --model out for the bundled model"
        )


def _timeout() -> float:
    """The timeout in seconds: the client's setting if it is not its default, else ours."""
    from huggingface_hub import constants

    given = constants.HF_HUB_ETAG_TIMEOUT
    return _SECONDS if given == constants.DEFAULT_ETAG_TIMEOUT else float(given)
