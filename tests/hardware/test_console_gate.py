"""Who may open the console, and what dragging the end effector means."""

import http.client
import sys
from http import HTTPStatus

import numpy as np
import pytest

from hardware.console.gate import Gate, guarding, is_loopback
from hardware.console.server import TOKEN_VARIABLE, Console, ConsoleConfig
from hardware.console.steering import make_handle, multiply, to_quaternion, to_rotation_vector
from robot_rl.core.errors import ConfigError, DataError, HardwareError, MissingDependencyError, UnknownNameError
from robot_rl.core.paths import data_file
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import Teleop

TOKEN = "correct horse battery"
POSE = ArraySpec((6,), names=("x", "y", "z", "rx", "ry", "rz"), unit="m,m,m,rad,rad,rad", low=(-1,) * 6, high=(1,) * 6)
SPEC = Spec({"state": ArraySpec((6,))}, POSE, 20.0)


def headers(host="localhost:8080", **more):
    return {"Host": host, **more}


def test_only_the_pages_own_origin_may_connect():
    gate = Gate("127.0.0.1")
    assert gate.judge("/", headers()).status is None
    assert gate.judge("/", headers(Origin="http://localhost:8080")).status is None
    for origin in ("http://evil.example", "http://localhost:9999", "null"):
        verdict = gate.judge("/", headers(Origin=origin))
        assert verdict.status is HTTPStatus.FORBIDDEN, origin


def test_a_foreign_name_for_this_machine_is_refused():
    gate = Gate("127.0.0.1")
    for name in ("evil.example:8080", "evil.example", "", "127.0.0.1.evil.example"):
        verdict = gate.judge("/", headers(name, Origin=f"http://{name}"))
        assert verdict.status is HTTPStatus.FORBIDDEN, name
    for name in ("127.0.0.1:8080", "[::1]:8080", "localhost"):
        assert gate.judge("/", headers(name)).status is None


def test_wider_than_this_machine_only_with_a_token():
    for host in ("0.0.0.0", "192.168.1.5", "robot.lan", "::", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
            Gate(host)
        Gate(host, TOKEN)
    with pytest.raises(ConfigError, match="at least 16"):
        Gate("127.0.0.1", "guess")


def test_the_token_is_exchanged_for_a_cookie_and_nothing_else_opens():
    gate = Gate("0.0.0.0", TOKEN)
    host = "robot.lan:8080"
    for target in ("/", "/?token=", "/?token=wrong", f"/?token={TOKEN}x", "/?token=%C3%A9"):
        assert gate.judge(target, headers(host)).status is HTTPStatus.FORBIDDEN
    verdict = gate.judge(f"/?token={TOKEN.replace(' ', '+')}", headers(host))
    assert verdict.status is HTTPStatus.SEE_OTHER
    assert verdict.headers["Location"] == "/", "the token does not stay in the address"
    cookie = verdict.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    pair = cookie.split(";")[0]
    assert gate.judge("/", headers(host, Cookie=f"other=1; {pair}")).status is None
    assert gate.judge("/", headers(host, Cookie=pair, Origin="http://evil.example")).status is HTTPStatus.FORBIDDEN
    assert gate.judge("/", headers(host, Cookie=pair + "x")).status is HTTPStatus.FORBIDDEN
    assert gate.judge("/", headers(host, Cookie="\x00;=;")).status is HTTPStatus.FORBIDDEN
    assert Gate("0.0.0.0", TOKEN).judge("/", headers(host, Cookie=pair)).status is HTTPStatus.FORBIDDEN


def test_a_server_that_does_not_pass_the_gate_does_not_run():
    with pytest.raises(HardwareError, match="cannot be guarded"), guarding(Gate("127.0.0.1")):
        pass


def ask(console, target="/", upgrade=False, **more):
    host, port = console.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    if upgrade:
        more |= {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        more |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "viser-v1.1.1"}
    connection.request("GET", target, headers=more)
    answer = connection.getresponse()
    body = b"" if upgrade and answer.status == 101 else answer.read()
    connection.close()
    return answer, body


def test_the_running_server_is_behind_the_gate():
    pytest.importorskip("viser")
    with Console(SPEC, ConsoleConfig(port=8570), token=TOKEN) as console:
        assert isinstance(console, Teleop)
        for upgrade in (False, True):
            answer, body = ask(console, upgrade=upgrade)
            assert answer.status == 403
            assert b"token" in body
            assert answer.headers.get_all("Content-Type") == ["text/plain; charset=utf-8"]
        answer, _ = ask(console, f"/?token={TOKEN.replace(' ', '%20')}")
        cookie = answer.headers["Set-Cookie"].split(";")[0]
        answer, body = ask(console, Cookie=cookie)
        assert (answer.status, b"<html" in body) == (200, True)
        answer, _ = ask(console, upgrade=True, Cookie=cookie)
        assert answer.status == 101
        answer, _ = ask(console, upgrade=True, Cookie=cookie, Origin="http://evil.example")
        assert answer.status == 403
        assert console._server.request_share_url() is None, "no page can publish the console through a tunnel"
    console.disconnect()


def test_the_settings_are_checked_before_anything_is_opened(monkeypatch):
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        Console(SPEC, ConsoleConfig(host="0.0.0.0"))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    Console(SPEC, ConsoleConfig(host="0.0.0.0"))
    with pytest.raises(HardwareError, match=r"cannot listen on '203\.0\.113\.7'"):
        Console(SPEC, ConsoleConfig(host="203.0.113.7")).connect()
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(MissingDependencyError, match=r"robot-rl\[console\]"):
        Console(SPEC, ConsoleConfig()).connect()


# ---- dragging --------------------------------------------------------------------------------------------------------


def test_a_pose_action_is_the_handles_pose():
    handle = make_handle(POSE)
    action = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6])
    position, quaternion = handle.pose(action)
    np.testing.assert_allclose(position, action[:3])
    np.testing.assert_allclose(handle.action(position, quaternion, np.zeros(6)), action, atol=1e-12)
    np.testing.assert_allclose(handle.action(position, -quaternion, np.zeros(6)), action, atol=1e-12)


def test_a_planar_action_is_dragged_in_its_plane_and_keeps_its_other_elements():
    action = ArraySpec((3,), names=("x", "grip", "y"), unit="m")
    handle = make_handle(action)
    assert handle.moves == (True, True, False)
    assert not handle.turns
    np.testing.assert_array_equal(handle.action(np.array([1.0, 2.0, 9.0]), np.eye(4)[0], [5.0, 6.0, 7.0]), [1, 6, 2])


def test_rates_and_unknown_elements_have_no_handle():
    assert make_handle(ArraySpec((3,), names=("x", "y", "z"), unit="m/s")) is None
    assert make_handle(ArraySpec((7,), unit="rad")) is None


def test_rotation_vectors_and_quaternions_are_inverse():
    rng = np.random.default_rng(0)
    for _ in range(50):
        vector = rng.uniform(-1, 1, 3) * rng.uniform(0, 1.8)
        np.testing.assert_allclose(to_rotation_vector(to_quaternion(vector)), vector, atol=1e-9)
    half = to_quaternion(np.array([0, 0, np.pi / 4]))
    np.testing.assert_allclose(multiply(half, half), to_quaternion(np.array([0, 0, np.pi / 2])), atol=1e-12)
    np.testing.assert_array_equal(to_rotation_vector(np.array([1.0, 0, 0, 0])), np.zeros(3))


PANDA = data_file("assets", "franka_panda", "panda.xml")
JOINTS = tuple(f"joint{k}" for k in range(1, 8))


def arm_action(names=JOINTS):
    import mujoco

    model = mujoco.MjModel.from_xml_path(str(PANDA))
    ranges = [model.joint(k).range for k in range(7)]
    low, high = (tuple(float(one[side]) for one in ranges) for side in (0, 1))
    return ArraySpec((7,), names=names, unit="rad", low=low, high=high)


def test_inverse_kinematics_brings_the_arm_to_the_handle():
    import mujoco

    names = [mujoco.MjModel.from_xml_path(str(PANDA)).joint(k).name for k in range(7)]
    action = arm_action(tuple(names))
    handle = make_handle(action, PANDA)
    home = np.array([0.0, 0.2, 0.0, -1.9, 0.0, 2.1, 0.8])
    position, quaternion = handle.pose(home)
    wanted = position + np.array([0.05, -0.04, 0.06])
    turned = multiply(to_quaternion(np.array([0.1, 0.0, 0.2])), quaternion)
    joints = handle.action(wanted, turned, home)
    reached, facing = handle.pose(joints)
    np.testing.assert_allclose(reached, wanted, atol=1e-4)
    np.testing.assert_allclose(multiply(facing, turned * [1, -1, -1, -1])[1:], 0, atol=1e-4)
    assert np.abs(joints - home).max() < 0.6, "the nearest way"
    low, high = action.bounds()
    far = handle.action(position + np.array([5.0, 0.0, 0.0]), quaternion, home)
    assert (far >= low - 1e-9).all()
    assert (far <= high + 1e-9).all()


def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(UnknownNameError, match=r"joint of panda\.xml"):
        make_handle(arm_action(tuple("abcdefg")), PANDA)
    with pytest.raises(UnknownNameError, match=r"site of panda\.xml"):
        make_handle(arm_action(), PANDA, site="hand of god")
    with pytest.raises(ConfigError, match="joints are named for an action of 6"):
        make_handle(POSE, PANDA, joints=("joint1",))
    broken = tmp_path / "robot.xml"
    broken.write_text("<mujoco><worldbody/></mujoco>")
    with pytest.raises(ConfigError, match="no site"):
        make_handle(POSE, broken)
    broken.write_text("no xml")
    with pytest.raises(DataError, match="cannot be read"):
        make_handle(POSE, broken)
