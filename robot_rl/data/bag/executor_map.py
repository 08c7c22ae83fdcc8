"""The topic map of a recording of our own executor, whose topics say by themselves what they hold."""

from __future__ import annotations

import json
from typing import Any

from robot_rl.core.errors import RobotRLError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.bag.bag import Bag
from robot_rl.data.bag.names import EXECUTED, OBSERVATION, ROBOT_SPEC, image_topic

_IMAGE_SECONDS = 0.1
"""Age (s) up to which an image stands for what was seen in a step."""


def executor_map(bag: Bag) -> dict[str, Any] | None:
    """Return the content of a topic map for the first executor in ``bag``, None if there is none.

    The executed command acts, the observations are those that the policy got, at the instants of the steps, and
    ``actor``, ``policy_action``, ``intervention`` and ``safety_flags`` of every step come with them.
    """
    for name in sorted(bag.topics):
        prefix = name.removesuffix(EXECUTED)
        if name.endswith(f"/{EXECUTED}") and {prefix + OBSERVATION, prefix + ROBOT_SPEC} <= set(bag.topics):
            try:
                spec = Spec.from_json(json.loads(_first(bag, prefix + ROBOT_SPEC)["data"]))
                return _map_of(bag, spec, prefix)
            except (RobotRLError, ValueError, TypeError, KeyError, AttributeError):
                return None  # only named like ours
    return None


def _map_of(bag: Bag, spec: Spec, prefix: str) -> dict[str, Any]:
    executed, observed = (_first(bag, prefix + name)["name"] for name in (EXECUTED, OBSERVATION))
    half = 0.5 / spec.rate_hz

    def part(topic: str, names: list[str], key: str, like: ArraySpec | None = None) -> dict[str, Any]:
        found = [name for name in names if name == key or name.startswith(f"{key}/")]
        entry = {"topic": prefix + topic, "field": "position", "names": found, "tolerance": half}
        if like is not None:
            entry |= {name: text for name, text in (("unit", like.unit), ("frame", like.frame)) if text}
        return entry

    observation: dict[str, Any] = {}
    for key, one in spec.observation.items():
        if not one.is_image:
            observation[key] = part(OBSERVATION, observed, key, one)
            continue
        topic = prefix + image_topic(key)
        if topic in bag.topics:
            observation[key] = {"topic": topic, "tolerance": _IMAGE_SECONDS}
    extras = {key: part(EXECUTED, executed, key) for key in ("actor", "policy_action", "intervention", "safety_flags")}
    return {
        "rate_hz": spec.rate_hz,
        "task": "",
        "observation": observation,
        "action": part(EXECUTED, executed, "action", spec.action),
        "extras": extras,
        "episodes": part(EXECUTED, executed, "episode"),
        "instants": prefix + EXECUTED,
    }


def _first(bag: Bag, topic: str) -> dict[str, Any]:
    """Return the first message of ``topic``; `ValueError` where there is none."""
    for message in bag.messages({topic}):
        return bag.topic(topic).message_type().decode(message.data)
    raise ValueError(f"no message of {topic}")
