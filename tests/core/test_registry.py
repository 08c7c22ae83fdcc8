import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from robot_rl.core import registry
from robot_rl.core.errors import ConfigError, MissingDependencyError, RobotRLError, UnknownNameError


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


def test_options_may_follow_a_task_wherever_it_is_named(monkeypatch):
    monkeypatch.setattr(registry, "_overrides", {})
    registry.register("tasks", "family", lambda argument="", **options: (argument, options))
    text = "family:Name-v0,hold=5,scale=-0.5,reward=shaped,slow=yes"
    given = {"hold": 5, "scale": -0.5, "reward": "shaped", "slow": True}
    assert registry.make_env(text, num_envs=3, seed=1) == ("Name-v0", {"num_envs": 3, "seed": 1, **given})
    assert registry.task_family(text) == registry.task_family("family,hold=5") == "family"
    for wrong, message in (
        ("family,hold", "'hold' is no option: expected name=value"),
        ("family,", "'' is no option"),
        ("family,seed=2", "the option 'seed' is given in another way already"),
        ("family,num_envs=2", "'num_envs' is given in another way"),
        ("family,hold=1,hold=2", "'hold' is given in another way"),
    ):
        with pytest.raises(ConfigError, match=message):
            registry.make_env(wrong, seed=1)


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_every_group_has_our_own_entries(group):
    assert registry.names(group)


@dataclass
class Distribution:
    name: str


@pytest.fixture
def plug_in(monkeypatch, tmp_path):
    """Plug a task ``mine`` of the distribution ``mine-dist`` in, whose module has the given text."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(text):
        (tmp_path / "mine_plugin.py").write_text(text)
        sys.modules.pop("mine_plugin", None)
        entry = EntryPoint("mine", "mine_plugin:make", "robot_rl.tasks")._for(Distribution("mine-dist"))
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry])

    yield install
    sys.modules.pop("mine_plugin", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package_here", "needs the package 'no_such_package_here', which is not installed"),
        ("def make(:", "cannot be loaded: SyntaxError"),
        ("", "cannot be loaded: AttributeError"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_names_its_own_distribution(plug_in, text, message):
    plug_in(text)
    with pytest.raises(RobotRLError) as error:
        registry.load("tasks", "mine")
    assert str(error.value).startswith("The task 'mine' of the distribution 'mine-dist' ")
    assert message in str(error.value)
    assert "robot-rl[" not in str(error.value)


def test_our_own_missing_package_names_the_extra(monkeypatch):
    entry = EntryPoint("mine", "no_such_package_here:make", "robot_rl.tasks")._for(Distribution("robot-rl"))
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(MissingDependencyError, match=r"pip install 'robot-rl\[all\]'"):
        registry.load("tasks", "mine")
