"""Our launch runner: what it reads, what it refuses, the command lines that it builds, and how it ends processes."""

import errno
import io
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from hardware.cli.launch import Config, find, run
from hardware.launching import expression
from hardware.launching.action import Process, Scope, Shutdown
from hardware.launching.plan import LaunchFile, parse_arguments
from hardware.launching.runner import Runner
from hardware.launching.substitution import parse
from robot_rl.core.errors import ConfigError, DataError, HardwareError, RobotRLError

PYTHON = shlex.quote(sys.executable)


@pytest.fixture
def package(tmp_path):
    """A ROS 2 package ``talk`` in a prefix of its own, as an environment."""
    (tmp_path / "prefix" / "share" / "ament_index" / "resource_index" / "packages").mkdir(parents=True)
    (tmp_path / "prefix" / "share" / "ament_index" / "resource_index" / "packages" / "talk").touch()
    (tmp_path / "prefix" / "lib" / "talk").mkdir(parents=True)
    (tmp_path / "prefix" / "lib" / "talk" / "talker").touch()
    return {"AMENT_PREFIX_PATH": f"/nowhere:{tmp_path / 'prefix'}", "USER": "ada"}


@pytest.fixture
def launch(tmp_path):
    """Write a launch file (the text after ``launch:``) and return it, read."""

    def write(text, name="robot.launch.yaml"):
        path = tmp_path / name
        path.write_text("launch:\n" + text)
        return LaunchFile(path)

    return write


@pytest.fixture
def domain(new_domain):
    """A ROS 2 domain of our own on this machine only."""
    from hardware.ros.context import prepare_environment

    saved = dict(os.environ)
    prepare_environment(new_domain())
    yield
    os.environ.clear()
    os.environ.update(saved)


def processes(file, given=None, environment=None):
    return [one for one in file.actions(given or {}, environment or {}) if isinstance(one, Process)]


def command(process):
    """The command line, with inline parameters in the place of their file."""
    return process.command(lambda content: Path(yaml.safe_dump(content, default_flow_style=True).strip()))


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7),
        ("-(7 // 2) % 5", 2),
        ("'$x' == 'y' or 3 <= 4 < 5", True),
        ("not (1 > 2 and undefined)", True),
        ("'sim' in ('sim', 'fake')", True),
        ("0.5 if '' else 'no'", "no"),
        ("max(1, round(2.6), len('abcd'))", 4),
        ("'a' + 'b'", "ab"),
    ],
)
def test_expressions(text, value):
    assert expression.evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "open('/etc/passwd')",
        "[x for x in (1, 2)]",
        "2 ** 99999999",
        "'a' * 10000000000",
        "'%s' % 1",
        "lambda: 1",
        "f'{1}'",
        "max(key=1)",
        "1 +",
        "1 / 0",
        "-" * 5000 + "1",
    ],
)
def test_expressions_that_are_refused(text):
    with pytest.raises(ConfigError):
        expression.evaluate(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain $5 text", "plain $5 text"),
        ("$(var robot)/$(dirname)", "arm//files"),
        (r"\$(var robot)", "$(var robot)"),
        ("$(env USER)-$(env NOBODY none)", "ada-none"),
        ("$(env NOBODY '')", ""),
        ("$(eval '$(var count) + 1')", "3"),
        ("$(eval \"'$(var robot)' == 'arm'\")", "True"),
        ("$(not $(equals $(var robot) sim))", "true"),
        ("$(and 1 $(or false yes))", "true"),
        ("$(equals 1 true) $(equals 0.30 0.3) $(equals a b)", "true true false"),
        ("$(find-pkg-prefix talk)|$(find-pkg-share talk)", "{prefix}|{prefix}/share/talk"),
    ],
)
def test_substitutions(text, value, package, tmp_path):
    scope = Scope({"robot": "arm", "count": "2"}, package, Path("/files"))
    assert parse(text).resolve(scope) == value.format(prefix=tmp_path / "prefix")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$(command ls)", r"Unknown substitution '\$\(command\)'"),
        ("$(var)", r"\$\(var\) has 0 arguments, expected 1"),
        ("$(eval 1 + 2)", "quote one that holds spaces"),
        ("$(var robot", "not closed"),
        ("$(eval 'x)", "not closed"),
        ("$(var robt)", "Did you mean 'robot'"),
        ("$(env NOBODY)", "'NOBODY' is not set"),
        ("$(not 2)", "neither true nor false"),
        ("$(equals $(var robot) '')", "with an empty argument"),
        ("$(find-pkg-share walk)", "no ROS 2 package 'walk'"),
        ("$(eval 'open(1)')", "not allowed in an expression"),
    ],
)
def test_substitutions_that_are_refused(text, message, package):
    with pytest.raises(RobotRLError, match=message):
        parse(text).resolve(Scope({"robot": "arm"}, package, Path("/files")))


def test_words_of_a_command_line_and_values_with_spaces():
    scope = Scope({"file": "my file", "more": "b c"}, {}, Path("/"))
    assert parse("--path $(var file)/x 'two words' -p$(var more)").split(scope) == [
        *("--path", "my file/x", "two words", "-pb c")
    ]


# ---- command lines --------------------------------------------------------------------------------------------------


def test_command_line_of_a_node_is_the_one_of_launch_ros(launch, package, tmp_path):
    (tmp_path / "talk.yaml").write_text("/**:\n  ros__parameters:\n    rate: 5.0\n")
    file = launch("""
  - arg: {name: rate, default: "2.5"}
  - arg: {name: record, default: ""}
  - set_parameter: {name: shared, value: "7"}
  - set_use_sim_time: {value: true}
  - set_remap: {from: /clock, to: /time}
  - push-ros-namespace: {namespace: lab}
  - group:
      - push_ros_namespace: {namespace: desk/}
      - set_parameter: {name: inner, value: true}
      - node:
          pkg: talk
          exec: talker
          name: chatter
          namespace: left
          args: --fast "two words" $(var rate)
          param:
            - from: $(dirname)/talk.yaml
            - {name: rate, value: $(var rate)}
            - {name: names, value: ["a=$(var rate)", b]}
            - {name: record, value: $(var record), type: str}
            - {name: digits, value: "5"}
          remap:
            - {from: chat, to: talk_$(var rate)}
  - node: {pkg: talk, exec: talker}
  - node: {pkg: talk, exec: talker, name: alone, namespace: /}
""")
    first, second, third = map(command, processes(file, {}, package))
    talker = str(tmp_path / "prefix" / "lib" / "talk" / "talker")
    node = "/lab/desk/left/chatter: {ros__parameters: {"
    assert first == [
        *(talker, "--fast", "two words", "2.5", "--ros-args", "-r", "__node:=chatter", "-r", "__ns:=/lab/desk/left"),
        *("-p", "shared:=7", "-p", "use_sim_time:=True", "-p", "inner:=True"),
        *("--params-file", str(tmp_path / "talk.yaml")),
        *("--params-file", "{" + node + "rate: 2.5}}}"),
        *("--params-file", "{" + node + "names: [a=2.5, b]}}}"),
        *("--params-file", "{" + node + "record: ''}}}"),
        *("--params-file", "{" + node + "digits: '5'}}}"),
        *("-r", "/clock:=/time", "-r", "chat:=talk_2.5"),
    ]
    rest = ["-p", "shared:=7", "-p", "use_sim_time:=True", "-r", "/clock:=/time"]
    assert second == [talker, "--ros-args", "-r", "__ns:=/lab", *rest]
    assert third == [talker, "--ros-args", "-r", "__node:=alone", "-r", "__ns:=/", *rest]


@pytest.mark.ros
@pytest.mark.timeout(60)
def test_a_node_gets_exactly_these_names_parameters_and_remappings(launch, package, tmp_path, domain):
    """ROS 2's own argument parser reads what was built; in particular the last of several values wins."""
    pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    from hardware.ros.endpoint import Endpoint

    (tmp_path / "talk.yaml").write_text(
        "/**:\n  ros__parameters: {rate: 5.0, file: yes, shared: 1}\n"
        "/lab/chatter:\n  ros__parameters: {named: 3}\n/other/chatter:\n  ros__parameters: {named: 4}\n"
    )
    file = launch("""
  - arg: {name: rate}
  - set_parameter: {name: shared, value: "7"}
  - node:
      pkg: talk
      exec: talker
      name: chatter
      namespace: lab
      param:
        - from: $(dirname)/talk.yaml
        - {name: rate, value: $(var rate)}
        - {name: names, value: ["a=$(var rate)", b]}
        - {name: empty, value: "", type: str}
        - {name: digits, value: "5"}
        - {name: same, value: $(equals a a)}
        - {name: counts, value: [1, 2]}
      remap:
        - {from: chat, to: /talk}
""")
    (process,) = processes(file, {"rate": "2.5"}, package)
    count = iter(range(99))

    def write(content):
        path = tmp_path / f"inline{next(count)}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    arguments = process.command(write)
    endpoint = Endpoint("unnamed", arguments=arguments[arguments.index("--ros-args") :])
    try:
        node = endpoint.node
        assert node.get_fully_qualified_name() == "/lab/chatter"
        assert node.resolve_topic_name("chat") == "/talk"
        values = {name: node.get_parameter(name).value for name in node.list_parameters([], 0).names}
        own = ("use_sim_time", "start_type_description_service")
        assert {name: value for name, value in values.items() if name not in own} == {
            "rate": 2.5,
            "file": True,
            "shared": 1,
            "named": 3,
            "names": ["a=2.5", "b"],
            "empty": "",
            "digits": "5",
            "same": True,
            "counts": [1, 2],
        }
    finally:
        endpoint.close()


def test_arguments_scopes_and_includes(launch, tmp_path):
    launch(
        """
  - arg: {name: task, description: What to do., choice: [{value: peg}, {value: push}]}
  - arg: {name: speed, default: "$(var base)0"}
  - let: {name: seen, value: "$(var task) $(var speed)"}
  - executable: {cmd: "inner $(var seen) $(dirname)", env: [{name: HERE, value: "1"}]}
""",
        "inner.launch.yaml",
    )
    file = launch("""
  - arg: {name: task, default: peg}
  - let: {name: base, value: "1"}
  - set_env: {name: COLOUR, value: red}
  - group:
      - set_env: {name: COLOUR, value: blue}
      - unset_env: {name: GONE}
      - include: {file: inner.launch.yaml, arg: [{name: task, value: $(var task)}]}
  - group:
      scoped: false
      if: $(eval "'$(var task)' == 'push'")
      children:
        - let: {name: base, value: "2"}
  - executable: {cmd: outer $(var base) $(dirname), unless: $(equals $(var base) 3)}
  - executable: {cmd: never, if: "False"}
""")
    inner, outer = processes(file, {"task": "push"}, {"GONE": "x", "KEPT": "y"})
    assert inner.words == ("inner", "push 10", str(tmp_path))
    assert dict(inner.environment) == {"COLOUR": "blue", "KEPT": "y", "HERE": "1"}
    assert outer.words == ("outer", "2", str(tmp_path))
    assert dict(outer.environment) == {"COLOUR": "red", "GONE": "x", "KEPT": "y"}
    assert [(one.name, one.default) for one in file.arguments()] == [("task", "peg"), ("speed", "$(var base)0")]
    assert processes(file, {"speed": "4"})[0].words[1] == "peg 4", "arguments of included files can be given"
    with pytest.raises(ConfigError, match=r"inner.launch.yaml:3: .*Unknown value of the argument 'task' 'pull'"):
        processes(file, {"task": "pull"})
    assert parse_arguments(("a:=1", "b:=x:=y", "c:=")) == {"a": "1", "b": "x:=y", "c": ""}
    with pytest.raises(ConfigError, match="not of the form name:=value"):
        parse_arguments(("a=1",))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("  - nod: {pkg: talk, exec: talker}", 2, "Unknown launch action 'nod'.*Did you mean 'node'"),
        ("\n  - opaque_function: {function: f}", 3, "Unknown launch action"),
        ("  - node: {pkg: talk, exe: talker}", 2, "Unknown attribute of 'node' 'exe'.*Did you mean 'exec'"),
        ("  - node: {pkg: talk}", 2, "'node' has no 'exec'"),
        ("  - let: {name: a, value: 5}", 2, "'value' of 'let' is 5, expected text"),
        ("  - let: {name: a, value: $(find-exec ls)}", 2, "Unknown substitution"),
        ("  - let: {name: a, value: b, name: c}", 2, "'name' is given twice"),
        ("  - let: {name: a, value: b}\n    log: {message: x}", 2, "one key"),
        ("  - let", 1, "one key"),
        ("  - timer: {period: 5, children: []}", 2, "with a decimal point"),
        ("  - group:\n      - let: {nam: a}", 3, "Unknown attribute of 'let'"),
        ("  - executable: {cmd: a, env: {A: b}}", 2, "expected a list"),
        ("  - executable: {cmd: a, on_exit: restart}", 2, "expected shutdown"),
        ("  - node: {pkg: a, exec: b, param: [{value: 1}]}", 2, "expected either 'from', or 'name' and 'value'"),
        ("  - node: {pkg: a, exec: b, param: [{name: x, value: [1, a]}]}", 2, "mixes kinds"),
        ("  - node: {pkg: a, exec: b, param: [{name: x, value: '1', type: int}]}", 2, "expected str"),
    ],
)
def test_what_is_outside_the_subset_is_refused_with_file_and_line(launch, text, line, message):
    with pytest.raises(RobotRLError, match=rf"robot.launch.yaml:{line}: .*{message}"):
        launch(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  - arg: {name: task, description: What to do.}", r"'task' is missing: task:=… \(What to do.\)"),
        ("  - executable: {cmd: a, if: maybe}", "condition is 'maybe'"),
        ("  - node: {pkg: talk, exec: walker}", "executable of the package 'talk' 'walker'.*Did you mean 'talker'"),
        ("  - node: {pkg: talk, exec: talker, param: [{from: gone.yaml}]}", "'gone.yaml' does not exist"),
        ("  - node: {pkg: talk, exec: talker, param: [{name: a, value: $(env EMPTY 2000-01-01)}]}", "type: str"),
        ("  - node: {pkg: talk, exec: talker, output: loud}", "Unknown output 'loud'"),
        ("  - include: {file: $(dirname)/robot.launch.yaml}", "include itself"),
    ],
)
def test_what_turns_out_wrong_is_refused_with_file_and_line(launch, package, text, message):
    with pytest.raises(ConfigError, match=rf"robot.launch.yaml:2: .*{message}"):
        processes(launch(text), {}, package)


def test_files_and_arguments_that_do_not_exist(launch, tmp_path):
    with pytest.raises(RobotRLError, match="Did you mean 'speed'"):
        processes(launch("  - arg: {name: speed, default: '1'}"), {"sped": "2"})
    with pytest.raises(DataError, match="cannot be read: No such file"):
        LaunchFile(tmp_path / "gone.launch.yaml")
    with pytest.raises(DataError, match="does not exist"):
        find("gone.launch.yaml")
    with pytest.raises(RobotRLError, match="Did you mean 'deploy'"):
        find("deplo")
    (tmp_path / "odd.yaml").write_text("launch: [")
    with pytest.raises(DataError, match=r"odd.yaml:1: this is no launch file in YAML"):
        LaunchFile(tmp_path / "odd.yaml")


# ---- running --------------------------------------------------------------------------------------------------------


def run_for(file, tmp_path, given=None, stop_when=None, patience=20.0):
    """Run a launch file; return the exit code, the lines, and the seconds it took from the interruption."""
    output, stop, code, interrupted = io.StringIO(), threading.Event(), [], 0.0
    actions = file.actions(given or {}, dict(os.environ))
    thread = threading.Thread(target=lambda: code.append(Runner(tmp_path / "logs", output).run(actions, stop)))
    thread.start()
    deadline = time.monotonic() + patience
    while thread.is_alive() and time.monotonic() < deadline:
        if stop_when is not None and not stop.is_set() and stop_when(output.getvalue()):
            interrupted = time.monotonic()
            stop.set()
        time.sleep(0.01)
    stop.set()
    thread.join(patience)
    return code[0], output.getvalue().splitlines(), time.monotonic() - interrupted


def test_lines_are_named_and_failures_are_reported(launch, tmp_path):
    file = launch("""
  - log: {message: begin}
  - executable: {cmd: "sh -c 'echo one; printf two; exit 3'", name: a, output: screen}
  - executable: {cmd: "sh -c 'echo kept; echo seen >&2'", name: a, output: log}
  - timer: {period: 0.2, children: [{executable: {cmd: echo later, output: both}}]}
""")
    code, lines, _ = run_for(file, tmp_path)
    assert code == 1
    assert {"[launch] begin", "[a] one", "[a] two", "[a-2] seen", "[echo] later"} <= set(lines)
    assert "[launch] a ended with exit code 3" in lines
    assert "[launch] echo ended with exit code 0" in lines
    assert not any("kept" in line for line in lines)
    assert (tmp_path / "logs" / "a-2.log").read_text().split() == ["kept", "seen"]
    assert (tmp_path / "logs" / "echo.log").read_text() == "later\n"


def test_a_process_is_started_again_and_the_end_of_a_required_one_ends_all(launch, tmp_path):
    file = launch(f"""
  - executable: {{cmd: "{PYTHON} -c 'print(1)'", name: again, respawn: true, respawn_delay: 0.1, output: screen,
                 respawn_max_retries: 2}}
  - executable: {{cmd: sleep 1.5, name: needed, on_exit: shutdown}}
  - executable: {{cmd: sleep 60, name: other}}
""")
    code, lines, _ = run_for(file, tmp_path)
    assert code == 0
    assert sum(line.startswith("[launch] started again") for line in lines) == 3
    assert "[launch] ending everything: needed is required and has ended" in lines
    assert "[launch] other was killed by SIGINT" in lines


STUBBORN = """
import os, signal, sys, time
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), signal.SIG_IGN)
os.write(1, f"up {os.getpid()}\\n".encode())  # at once: two of them share a pipe
time.sleep(60)
"""


def test_interruption_escalates_over_process_groups(launch, tmp_path):
    """SIGINT to all; who ignores it gets SIGTERM, then SIGKILL; what they started goes with them."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    shell = f"{PYTHON} {script} SIGINT SIGTERM & {PYTHON} {script} & wait"
    file = launch(f"""
  - executable: {{cmd: "sh -c '{shell}'", name: parent, output: screen}}
  - executable: {{cmd: {PYTHON} {script} SIGINT, name: deaf, output: screen, sigterm_timeout: 0.3}}
  - executable: {{cmd: {PYTHON} {script} SIGINT SIGTERM, name: mad, output: screen,
                 sigterm_timeout: 0.3, sigkill_timeout: 0.3}}
""")
    code, lines, seconds = run_for(file, tmp_path, stop_when=lambda text: text.count("] up ") == 4)
    assert code == 0
    assert "[launch] ending everything: interrupted" in lines
    assert "[launch] parent was killed by SIGINT" in lines
    assert "[launch] deaf was killed by SIGTERM" in lines
    assert "[launch] mad was killed by SIGKILL" in lines
    assert 0.5 < seconds < 10.0
    for pid in [int(line.split()[-1]) for line in lines if "] up " in line]:
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "Z (zombie)" in status.read_text(), f"{pid} survived"


def test_an_error_on_the_way_ends_what_was_started(launch, tmp_path):
    file = launch("""
  - executable: {cmd: sleep 60, name: first}
  - executable: {cmd: /nowhere/program, name: second}
""")
    output = io.StringIO()
    with pytest.raises(HardwareError, match=r"robot.launch.yaml:4: second does not start"):
        Runner(tmp_path, output).run(file.actions({}, dict(os.environ)), threading.Event())
    assert "first was killed by SIGINT" in output.getvalue()


def test_a_process_of_another_user_does_not_keep_the_others_from_their_end(launch, tmp_path, monkeypatch, caplog):
    file = launch("""
  - executable: {cmd: sleep 5, name: first}
  - executable: {cmd: sleep 0.5, name: foreign, sigterm_timeout: 0.1}
""")
    stop, output, kill = threading.Event(), io.StringIO(), os.killpg
    runner = Runner(tmp_path, output)

    def refused(group, number):
        if group == runner.children[1].handle.pid:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        kill(group, number)

    monkeypatch.setattr(os, "killpg", refused)
    stop.set()
    assert runner.run(file.actions({}, dict(os.environ)), stop) == 0
    assert "first was killed by SIGINT" in output.getvalue()
    assert "foreign ended with exit code 0" in output.getvalue()
    assert [record.getMessage() for record in caplog.records] == [
        "foreign cannot be signalled (Operation not permitted): end it by hand"
    ]


def test_a_log_that_cannot_be_written_does_not_end_what_runs(launch, tmp_path):
    (tmp_path / "file").write_text("")
    file = launch("""
  - executable: {cmd: "sh -c 'echo one; echo two'", name: a, output: both}
""")
    output = io.StringIO()
    assert Runner(tmp_path / "file" / "logs", output).run(file.actions({}, dict(os.environ)), threading.Event()) == 0
    assert {"[a] one", "[a] two", "[launch] a ended with exit code 0"} <= set(output.getvalue().splitlines())
    assert output.getvalue().count("lines are missing in") == 1


def test_shutdown_ends_the_rest_and_starts_nothing_after_it(launch):
    file = launch("""
  - shutdown: {reason: enough}
  - executable: {cmd: /nowhere/program}
""")
    first, _ = file.actions({}, {})
    assert first == Shutdown("enough")
    output = io.StringIO()
    assert Runner(Path("/nowhere"), output).run(file.actions({}, {}), threading.Event()) == 0
    assert output.getvalue() == ""


def test_the_command_shows_arguments_and_command_lines(launch, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = launch("""
  - arg: {name: who, default: $(env USER nobody), description: Whom to greet.}
  - arg: {name: how, choice: [{value: loud}, {value: low}]}
  - timer: {period: 1.5, children: [{executable: {cmd: "greet $(var who) '$(var how)'", name: greeter}}]}
""").path
    assert run(Config(str(path), show_args=True)) == 0
    shown = capsys.readouterr().out
    assert "who (default: '$(env USER nobody)')\n      Whom to greet." in shown
    assert "how (must be given; one of loud, low)" in shown
    assert run(Config(str(path), ("who:=all of you", "how:=low"), print=True)) == 0
    assert capsys.readouterr().out == "after 1.5 s:\n  [greeter] greet 'all of you' low\n"


def test_interrupted_launcher_ends_its_processes(launch, tmp_path):
    """Through the command itself, with a real signal; the exit code is that of an ordered end."""
    import subprocess

    path = launch("  - executable: {cmd: sleep 60, name: sleeper}").path
    code = f"import sys; from hardware.cli.launch import Config, run; sys.exit(run(Config({str(path)!r})))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert "started sleeper" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "sleeper was killed by SIGINT" in output
    finally:
        process.kill()
