"""API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from dwdp.serving.openai.errors import unauthorized

_SCHEME = b"bearer "


class ApiKeys:
    """The keys that open the endpoint. Without any it is open to whoever reaches it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @property
    def is_required(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: bytes | None) -> None:
        """Raises ApiError 401 unless ``authorization``, the header's value, carries one of the keys.

        Digests of one length are compared, all of them in constant time, so the time taken tells nothing
        about a key.
        """
        if not self._digests:
            return
        if authorization is None:
            raise unauthorized("No API key: send it as 'Authorization: Bearer KEY'")
        given = _digest(authorization[len(_SCHEME) :].strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not authorization[: len(_SCHEME)].lower() == _SCHEME or not any(matches):
            raise unauthorized("The API key is not one of this server's")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
