"""What `robot-rl list` and `--help` say of plug-ins, without importing them."""

from importlib.metadata import EntryPoint

import pytest

from robot_rl.cli.catalog import entries, summary


@pytest.fixture
def plug_in(monkeypatch, tmp_path):
    """Return the entry point of a module with the given text."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(text, name="mine_listed", attr="make"):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("latin1"))
        return EntryPoint("mine", f"{name}:{attr}", "robot_rl.tasks")

    return install


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def make(:", "mine_listed", "(broken: mine_listed: SyntaxError: "),
        ("# \xff", "mine_listed", "(broken: mine_listed: UnicodeDecodeError: "),
        ("", "mine_absent.task", "(missing: mine_absent)"),
    ],
)
def test_a_broken_plug_in_is_named_and_takes_nothing_down(plug_in, text, name, message):
    entry = plug_in(text) if name == "mine_listed" else EntryPoint("mine", f"{name}:make", "robot_rl.tasks")
    assert summary(entry).startswith(message)
    assert "\n" not in summary(entry)


def test_a_package_that_breaks_while_it_is_looked_for_is_named(plug_in):
    plug_in("raise RuntimeError('no licence')", "mine_broken.__init__")
    entry = plug_in('"""A task."""', "mine_broken.task")
    assert summary(entry) == "(broken: mine_broken.task: RuntimeError: no licence)"


def test_a_factory_is_told_by_its_module_and_a_class_by_itself(plug_in):
    text = '"""Push a block\nto its goal (v1.2). Further."""\n\n{} make:\n    """Build the task.\n\n    Options."""\n'
    assert summary(plug_in(text.format("class"))) == "Build the task"
    assert (
        summary(plug_in(text.format("class").replace("class make", "def make()"))) == "Push a block to its goal (v1.2)"
    )
    assert summary(plug_in('def make():\n    """Build the task."""\n')) == "Build the task"


@pytest.mark.parametrize("group", ["tasks", "finetuners"])
def test_every_line_of_ours_says_something_else(group):
    lines = [summary(entry) for entry in entries(group).values()]
    assert len(set(lines)) == len(lines)
    assert not [line for line in lines if line.startswith(("Build", "Improve", "Learn a", "("))]
