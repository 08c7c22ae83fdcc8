"""A policy that runs on another computer, as a policy of this one.

Its address stands wherever a checkpoint does: ``ws://host:port/<policy>?token_file=<file>&timeout=<seconds>``. NumPy
only, so that a robot's computer needs no torch.
"""

from __future__ import annotations

import logging
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.errors import ConfigError, DataError, HardwareError
from robot_rl.core.realtime import Commitment
from robot_rl.core.spec import Spec
from robot_rl.serving.protocol import (
    LARGEST_MESSAGE,
    PROTOCOL,
    TOKEN_FILE,
    decode,
    encode,
    limit_sending,
    pack_commitment,
    read_token,
    require_packages,
)

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "ROBOT_RL_TOKEN_FILE"
"""Environment variable with the token file, where the address has none."""


@dataclass(frozen=True)
class Address:
    """Where a policy is served."""

    url: str
    """What is connected to."""
    token_file: Path
    """File with the token."""
    timeout: float
    """Seconds that a reply may take."""
    connect_timeout: float
    """Seconds that connecting may take, the loading of the policy on the server included."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address; raises `ConfigError` for one that is none."""
        parts = urllib.parse.urlsplit(text)
        options = dict(urllib.parse.parse_qsl(parts.query))
        token_file = options.pop("token_file", os.environ.get(TOKEN_VARIABLE, str(TOKEN_FILE)))
        try:
            times = float(options.pop("timeout", "2")), float(options.pop("connect_timeout", "30"))
            unusable = parts.port is None or not parts.hostname or min(times) <= 0
        except ValueError as error:
            raise ConfigError(f"the policy server's address '{text}' cannot be read: {error}") from error
        if unusable or options:
            known = "ws://host:port/<policy>?token_file=<file>&timeout=<seconds>&connect_timeout=<seconds>"
            raise ConfigError(f"the policy server's address '{text}' is not of the form {known}")
        return cls(urllib.parse.urlunsplit((*parts[:3], "", "")), Path(token_file), *times)


class RemotePolicy:
    """Plans on a server; implements `robot_rl.core.policy.Policy`.

    A reply that does not come in time, and a connection that is lost, are a `HardwareError`; the next call connects
    anew. An answer to an earlier question is never taken for one to a later.
    """

    kind = "remote"
    base = None

    def __init__(self, address: Address) -> None:
        require_packages()
        self.address = address
        self._connection: Any = None
        self._number = 0
        found = self._connect()
        try:
            self.spec = Spec.from_json(found["spec"])
            self.obs_steps, self.horizon = int(found["obs_steps"]), int(found["horizon"])
            self.execute_steps, self.closed_loop = int(found["execute_steps"]), bool(found["closed_loop"])
            self.real_time, self.prefix_steps = tuple(found["real_time"]), int(found["prefix_steps"])
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise DataError(f"{address.url} did not describe its policy: {error}") from error
        self._described = found

    @classmethod
    def connect(cls, address: str) -> RemotePolicy:
        """Connect to ``address``.

        Raises:
            ConfigError: the address or the token file cannot be used.
            HardwareError: nobody answers, or the server refuses; the message says why.
        """
        return cls(Address.parse(address))

    @classmethod
    def describe(cls, address: str) -> dict[str, Any]:
        """Return what `robot_rl.policies.checkpoint.read_description` returns of a checkpoint."""
        policy = cls.connect(address)
        policy.close()
        return {"policy": {"kind": cls.kind, "spec": policy.spec.to_json()}, "metadata": {}}

    def seed(self, seed: int) -> None:
        """Restart the stream of noises on the server."""
        self._ask({"type": "seed", "seed": int(seed)})

    def plan(
        self, history: Observation, noise: np.ndarray | None = None, commitment: Commitment | None = None
    ) -> np.ndarray:
        """Return chunks (B, H, A) in the action's units for a history of arrays (B, T, …).

        Args:
            history: the newest observations.
            noise: start noise as the served policy takes it; None leaves it to the server.
            commitment: what is executed while this is planned, to be continued.
        """
        question: dict[str, Any] = {"type": "plan", "history": self._sent(history)}
        if noise is not None:
            question["noise"] = np.asarray(noise, np.float32)
        if commitment is not None:
            question["commitment"] = pack_commitment(commitment)
        batch = len(next(iter(question["history"].values())))
        return self._actions(question, (batch, self.horizon, self.spec.action.size))

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return the actions (B, A) corrected for the newest history; unchanged by a policy that plans only."""
        if not self.closed_loop:
            return actions
        question = {"type": "refine", "history": self._sent(history), "actions": np.asarray(actions, np.float32)}
        return self._actions(question, actions.shape)

    def close(self) -> None:
        """End the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _sent(self, history: Observation) -> dict[str, np.ndarray]:
        specs = self.spec.observation
        return {key: np.asarray(history[key], specs[key].dtype) for key in specs}

    def _actions(self, question: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        actions = self._ask(question).get("actions")
        if not isinstance(actions, np.ndarray) or actions.shape != shape or not np.isfinite(actions).all():
            self.close()
            raise HardwareError(f"the policy server {self.address.url} did not answer with actions of shape {shape}")
        return actions

    def _connect(self) -> dict[str, Any]:
        from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        address = self.address
        token = read_token(address.token_file)
        try:
            self._connection = connect(
                address.url,
                additional_headers={"Authorization": f"Bearer {token}"},
                compression=None,
                proxy=None,
                max_size=LARGEST_MESSAGE,
                open_timeout=address.connect_timeout,
                close_timeout=0.5,
                ping_interval=5.0,
                ping_timeout=5.0,
            )
            limit_sending(self._connection, address.timeout)
            self._connection.send(encode({"type": "hello", "protocol": PROTOCOL}))
            found = decode(self._connection.recv(timeout=address.connect_timeout))
        except InvalidStatus as error:
            told = (error.response.body or b"").decode(errors="replace").strip()
            reason = told[:200] or f"HTTP status {error.response.status_code}"
            raise HardwareError(f"the policy server {address.url} refused: {reason}") from error
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException, DataError) as error:
            self.close()
            reason = str(error) or type(error).__name__
            raise HardwareError(f"the policy server {address.url} cannot be reached: {reason}") from error
        if found["type"] != "policy" or found.get("protocol") != PROTOCOL:
            self.close()
            reason = found.get("message", f"it speaks protocol {found.get('protocol')}, not {PROTOCOL}")
            raise HardwareError(f"the policy server {address.url} refused: {reason}")
        return found

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and return its answer within the deadline."""
        from websockets.exceptions import WebSocketException

        if self._connection is None:
            found = self._connect()
            if found != self._described:
                self.close()
                raise HardwareError(f"{self.address.url} serves another policy than before; start again")
            logger.info("connected to %s again", self.address.url)
        self._number += 1
        try:
            self._connection.send(encode({**question, "id": self._number}))
            answer = decode(self._connection.recv(timeout=self.address.timeout))
        except TimeoutError as error:
            self.close()
            raise HardwareError(
                f"the policy server {self.address.url} did not answer within {self.address.timeout:g} s"
            ) from error
        except (OSError, WebSocketException, DataError) as error:
            self.close()
            reason = str(error) or type(error).__name__
            raise HardwareError(f"the connection to {self.address.url} is lost: {reason}") from error
        if answer["type"] == "error" and answer.get("id") == self._number:
            raise DataError(f"the policy server refused: {answer.get('message')}")
        if answer["type"] != "result" or answer.get("id") != self._number:
            self.close()
            raise HardwareError(f"the policy server {self.address.url} answered another question: {answer['type']}")
        return answer
