"""A sum of which nobody sees a part: secure aggregation (Bonawitz et al. 2017, CCS, protocol 4, semi-honest).

Each client adds to its numbers, modulo 2³², a mask of its own and one with every other client, of which one adds what
the other subtracts. Masks are streams of AES-CTR, by keys that two clients agree on by X25519. Shares of what undoes
the masks (Shamir's, by Flower's code) are with the others: of its own mask for a client that has sent its numbers, of
its key for one that has not, never both.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares


# Numbers are fixed-point: 4 bits before the point, with the sign, and 28 behind it (our choice: what a round changes
# of an adapter is far below 8, and 2⁻²⁸ is below float32's precision there).
LARGEST, FRACTION = 8.0, 2.0**28
_KEY = 32  # bytes of a key
PUBLIC_BYTES = 2 * _KEY  # of a client's public keys


class SecureSumError(RuntimeError):
    """A sum that cannot be made: too few clients, or messages that do not fit."""


def to_fixed(values: np.ndarray, weight: float) -> np.ndarray:
    """Return weight times the values in fixed point, modulo 2³². Sums whose weights add up to 1 cannot wrap.

    Raises:
        SecureSumError: a weight that is not above 0, up to 1; a value that is not between ±`LARGEST`.
    """
    if not 0 < weight <= 1:
        raise SecureSumError(f"a weight of {weight} would show one update, or none: it must be above 0, up to 1")
    scaled = values.astype(np.float64) * weight * FRACTION
    if not np.abs(values).max(initial=0.0) <= LARGEST * (1 - 2**-24):  # by how much is nobody's matter
        raise SecureSumError(
            f"a value of the adapter has changed by {LARGEST:g} or more, which fixed-point numbers do not hold: lower "
            "learning_rate or local_steps, or leave secure_aggregation out"
        )
    return np.rint(scaled).astype(np.int64).astype(np.uint32)


def from_fixed(total: np.ndarray) -> np.ndarray:
    """Return what numbers in fixed point stand for."""
    return total.astype(np.uint32).view(np.int32) / FRACTION


@dataclass
class SummingClient:
    """A client's part in one sum.

    Attributes:
        me: its number. threshold: how many clients' shares undo a mask.
    """

    me: int
    threshold: int = 0
    _mask_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    _cipher_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    _own_seed: bytes = field(default_factory=lambda: os.urandom(_KEY))

    def __post_init__(self):
        self._public: dict[int, bytes] = {}
        self._kept: dict[int, bytes] = {}
        self._others: list[int] = []
        self._has_revealed = False

    @property
    def public(self) -> bytes:
        """Its two public keys, for masks and for what the others are told."""
        return self._mask_key.public_key().public_bytes_raw() + self._cipher_key.public_key().public_bytes_raw()

    def share(self, public: Mapping[int, bytes], threshold: int) -> dict[int, bytes]:
        """Return what each other client is told, encrypted, by its number.

        Args:
            public: of all clients, this one included.

        Raises:
            SecureSumError: so few that one of them, or the server, could see a part.
        """
        if not 2 <= threshold <= len(public) or 2 * threshold <= len(public) or public.get(self.me) != self.public:
            raise SecureSumError(f"a threshold of {threshold} of {len(public)} clients is not safe")
        self.threshold, self._public = threshold, dict(public)
        clients = sorted(public)
        seeds = create_shares(self._own_seed, threshold, len(clients))
        keys = create_shares(self._mask_key.private_bytes_raw(), threshold, len(clients))
        told = {client: seed + key for client, seed, key in zip(clients, seeds, keys, strict=True)}
        self._kept[self.me] = told.pop(self.me)
        return {client: self._encrypt(client, content) for client, content in told.items()}

    def mask(self, numbers: np.ndarray, told: Mapping[int, bytes]) -> np.ndarray:
        """Return the numbers with all masks.

        Args:
            told: what this client was told by each of the others that take part.

        Raises:
            SecureSumError: they are too few, or it was not they who have told it.
        """
        if len(told) + 1 < self.threshold or self._others:
            raise SecureSumError(f"{len(told) + 1} clients take part, {self.threshold} are needed, once")
        for client, content in told.items():
            self._kept[client] = self._decrypt(client, content)
        self._others = sorted(told)
        masked = numbers + _stream(self._own_seed, len(numbers))
        for other in self._others:
            masked = masked + _signed(self.me, other) * _stream(self._common_seed(other), len(numbers))
        return masked

    def reveal(self, arrived: Collection[int], missing: Collection[int]) -> dict[int, bytes]:
        """Return shares: of the own masks of clients whose numbers have arrived, of the keys of the missing ones.

        Raises:
            SecureSumError: that would show a part.
        """
        arrived, missing = set(arrived), set(missing)
        everyone = {self.me, *self._others}
        fits = arrived | missing == everyone and not arrived & missing and self.me in arrived
        if self._has_revealed or not fits or len(arrived) < self.threshold:
            raise SecureSumError("what is asked would show a client's own numbers")
        self._has_revealed = True
        half = len(self._kept[self.me]) // 2
        return {
            client: content[:half] if client in arrived else content[half:] for client, content in self._kept.items()
        }

    def _common_seed(self, other: int) -> bytes:
        return _agree(self._mask_key, self._public[other][:_KEY], b"mask")

    def _encrypt(self, other: int, content: bytes) -> bytes:
        nonce = os.urandom(12)
        key = _agree(self._cipher_key, self._public[other][_KEY:], b"cipher")
        return nonce + AESGCM(key).encrypt(nonce, content, f"{self.me} to {other}".encode())

    def _decrypt(self, other: int, content: bytes) -> bytes:
        key = _agree(self._cipher_key, self._public[other][_KEY:], b"cipher")
        try:
            return AESGCM(key).decrypt(content[:12], content[12:], f"{other} to {self.me}".encode())
        except InvalidTag as error:
            raise SecureSumError(f"what client {other} has told cannot be read") from error


def unmask(
    total: np.ndarray,
    public: Mapping[int, bytes],
    arrived: Collection[int],
    missing: Collection[int],
    revealed: Collection[Mapping[int, bytes]],
    threshold: int,
) -> np.ndarray:
    """Take all masks out of a sum.

    Args:
        total: of what has arrived. public: keys of all clients.
        arrived, missing: the clients whose numbers are in the sum, and those that others have masks with.
        revealed: what clients have revealed, at least `threshold` of them.

    Raises:
        SecureSumError: they are too few, or their shares do not fit.
    """
    if len(revealed) < threshold:
        raise SecureSumError(f"{len(revealed)} clients have revealed their shares, {threshold} are needed")
    try:
        secret = {
            client: combine_shares([shares[client] for shares in revealed][:threshold])
            for client in (*arrived, *missing)
        }
        for client in arrived:
            total = total - _stream(secret[client], len(total))
        for client in missing:
            key = X25519PrivateKey.from_private_bytes(secret[client])
            for other in arrived:
                seed = _agree(key, public[other][:_KEY], b"mask")
                total = total - _signed(other, client) * _stream(seed, len(total))
    except (KeyError, ValueError, IndexError) as error:
        raise SecureSumError(f"shares do not fit: {error}") from error
    return total


def _agree(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), _KEY, salt=None, info=b"hf-devft " + purpose).derive(secret)


def _stream(seed: bytes, count: int) -> np.ndarray:
    """`count` numbers below 2³² that nobody without the seed tells from random ones."""
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), dtype="<u4")


def _signed(one: int, other: int) -> np.uint32:
    """1 or, modulo 2³², -1: what one adds, the other subtracts."""
    return np.uint32(1) if one < other else np.uint32(2**32 - 1)
