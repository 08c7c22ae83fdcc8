import pytest

from robot_rl.core import registry
from robot_rl.core.errors import RobotRLError, UnknownNameError


def test_an_unknown_name_suggests_the_nearest_and_lists_what_exists():
    with pytest.raises(UnknownNameError, match=r"Unknown head 'flwo'\. Did you mean 'flow'\? Available: .*diffusion"):
        registry.load("heads", "flwo")


def test_registered_in_this_process(monkeypatch):
    monkeypatch.setattr(registry, "_overrides", {})
    registry.register("heads", "mine", 42)
    assert registry.load("heads", "mine") == 42
    assert "mine" in registry.names("heads")


def test_the_part_after_the_colon_reaches_the_factory(monkeypatch):
    monkeypatch.setattr(registry, "_overrides", {})
    registry.register("tasks", "family", lambda argument, num_envs: (argument, num_envs))
    assert registry.make_env("family:a/b:c", 3) == ("a/b:c", 3)
    with pytest.raises(RobotRLError, match=r"Task 'family:x'.*unexpected keyword argument 'speed'"):
        registry.make_env("family:x", 1, speed=2)


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_every_group_has_our_own_entries(group):
    assert registry.names(group)
