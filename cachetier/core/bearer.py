"""Bearer tokens: what a client must show where a port is open to more than this machine's user.

Read once, at the edge, from a file: not from an option, which every user of the machine sees in the list of processes.
"""

import hmac
from pathlib import Path

from cachetier.core.errors import ConfigError

TOKEN_CHARACTERS_MIN = 16


def read_token(path: str) -> str:
    """Return the bearer token in the file at `path`.

    Raises:
        ConfigError: the file cannot be read or the token is too short to be one.
    """
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file {path}: {error}") from error
    if len(token) < TOKEN_CHARACTERS_MIN or not token.isprintable() or not token.isascii():
        raise ConfigError(
            f"token_file {path} must hold at least {TOKEN_CHARACTERS_MIN} printable ASCII characters; make one with "
            "`openssl rand -hex 32`"
        )
    return token


def carries_token(authorization: str, token: str) -> bool:
    """Tell whether the header `authorization` shows `token`; takes as long whatever is wrong with it."""
    given = authorization.encode("utf-8", "surrogateescape")
    return hmac.compare_digest(given, f"Bearer {token}".encode())
