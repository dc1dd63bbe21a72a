"""Checkpoints on the Hugging Face hub, downloaded once into its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from blip2.errors import CheckpointError, ConfigError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # OWNER/NAME, perhaps @REVISION
_SMALL = ["*.json", "*.txt", "*.model"]  # configuration and tokenizer
_SAFE, _PICKLED = ["*.safetensors"], ["*.bin", "*.pdparams"]


def is_name(name: str) -> bool:
    """Whether this can only be a model on the hub: OWNER/NAME or OWNER/NAME@REVISION, and nothing here is called so."""
    return NAME.fullmatch(name) is not None and not Path(name).exists()


def download(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    cache: str | Path | None = None,
    weights: bool = True,
) -> Path:
    """The directory of a model in the hub's cache, downloaded where it is not there yet.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        revision: a branch, tag or commit; the main branch where None.
        token: of a user with access to it; the one that is logged in where None.
        offline: take what the cache has, ask nobody; so does the environment variable HF_HUB_OFFLINE=1.
        cache: where the cache is; its usual place where None.
        weights: False for configuration and tokenizer alone.
    Raises:
        CheckpointError: no such model or revision, no access, no network, or not in the cache.
    """
    name, _, named_revision = name.partition("@")
    if revision and named_revision and revision != named_revision:
        raise ConfigError(f"{name}: two revisions, {named_revision} and {revision}")
    revision = revision or named_revision or None
    where = {"revision": revision, "token": token, "local_files_only": offline, "cache_dir": cache}
    if not weights:
        return _snapshot(name, where, _SMALL)
    for files in (_SAFE, _PICKLED):
        place = _snapshot(name, where, [*_SMALL, *files])
        if any(match for pattern in files for match in place.glob(pattern)):
            return place
    raise CheckpointError(f"{name}: the hub has neither safetensors, .bin nor .pdparams of it")


def _snapshot(name: str, where: dict[str, Any], patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = where["revision"]
    what = name if revision is None else f"{name} at revision {revision}"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **where))
    except GatedRepoError:
        raise CheckpointError(
            f"{name}: its owners ask you to accept their terms first, at huggingface.co/{name}"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name}: has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name}: neither a directory here nor a model on the hub that you may see") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{what}: not in the cache, and the hub cannot be asked; connect once, or give a directory"
        ) from None
    except Exception as error:  # of the network library below, whichever that is
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{what}: cannot be downloaded: {reason}") from None
