"""A policy on another computer: the same answers, deadlines, and clients that mean harm or break."""

import socket
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("msgpack")
pytest.importorskip("websockets")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402
from websockets.sync.server import serve  # noqa: E402

from robot_rl.core.errors import ConfigError, DataError, HardwareError  # noqa: E402
from robot_rl.core.policy import Policy  # noqa: E402
from robot_rl.core.realtime import Commitment, RealTimeConfig  # noqa: E402
from robot_rl.core.spec import ArraySpec, Spec  # noqa: E402
from robot_rl.policies.checkpoint import load_policy, read_description, save_policy  # noqa: E402
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy  # noqa: E402
from robot_rl.rollout.player import PolicyRunner  # noqa: E402
from robot_rl.serving.protocol import LARGEST_MESSAGE, decode, encode, pack_commitment, unpack_commitment  # noqa: E402
from robot_rl.serving.server import PolicyWebServer, ServerConfig  # noqa: E402

SPEC = Spec({"state": ArraySpec((3,))}, ArraySpec((2,), low=(-1.0, -1.0), high=(1.0, 1.0)), 10.0)
PATIENCE = 60.0
HISTORY = {"state": np.ones((2, 2, 3), np.float32)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory of checkpoints, and a checkpoint beside it that must stay out of reach."""
    torch.manual_seed(0)
    outside = tmp_path_factory.mktemp("outside")
    root = outside / "root"
    policy = ChunkedPolicy(SPEC, ChunkedConfig(width=16, depth=1, horizon=8, execute_steps=4, sample_steps=2)).eval()
    torch.nn.init.normal_(policy.head.backbone.leave.weight)
    for directory in (root / "arm" / "best", outside / "secret"):
        save_policy(policy, directory)
    (root / "link").symlink_to(outside / "secret")
    return root


@pytest.fixture(scope="module")
def running(root):
    config = ServerConfig(port=0, token_file=root / "token", handshake_seconds=3.0, max_clients=3)
    with PolicyWebServer(root, config) as server:
        yield server


@pytest.fixture
def server(running):
    """The server that all tests share, once it has noticed that the clients of the test before have gone."""
    wait_for_clients(running, 0)
    return running


def wait_for_clients(server, number):
    deadline = time.monotonic() + PATIENCE
    while len(server._clients) != number:
        assert time.monotonic() < deadline, f"{len(server._clients)} clients instead of {number}"
        time.sleep(0.005)


@pytest.fixture
def address(server, root):
    return f"{server.address}/arm/best?token_file={root / 'token'}&timeout={PATIENCE}"


@pytest.fixture
def policy(address):
    policy = load_policy(address)
    yield policy
    policy.close()


def raw(server, **options):
    """A client of our own making, with the token."""
    headers = {"Authorization": f"Bearer {server._token}"}
    options = {"compression": None, "proxy": None, "max_size": None, **options}
    return connect(f"{server.address}/arm/best", additional_headers=headers, **options)


def greeted(server, **options):
    connection = raw(server, **options)
    connection.send(encode({"type": "hello", "protocol": 1}))
    assert decode(connection.recv(timeout=PATIENCE))["type"] == "policy"
    return connection


def test_a_served_policy_plans_what_it_plans_here(policy, root):
    local = load_policy(root / "arm" / "best")
    assert isinstance(policy, Policy)
    assert (policy.spec, policy.obs_steps, policy.horizon, policy.execute_steps) == (SPEC, 2, 8, 4)
    noise = np.random.default_rng(0).normal(size=(2, 8, 2)).astype(np.float32)
    np.testing.assert_array_equal(policy.plan(HISTORY, noise), local.plan(HISTORY, noise))
    commitment = Commitment(np.full((2, 8, 2), 0.3, np.float32), np.array([4, 0]), 2, RealTimeConfig("guided"))
    np.testing.assert_array_equal(policy.plan(HISTORY, noise, commitment), local.plan(HISTORY, noise, commitment))
    policy.seed(7), local.seed(7)
    np.testing.assert_array_equal(policy.plan(HISTORY), local.plan(HISTORY))
    actions = np.zeros((2, 2), np.float32)
    assert policy.refine(HISTORY, actions) is actions


def test_the_address_stands_where_a_checkpoint_does(address):
    assert Spec.from_json(read_description(address)["policy"]["spec"]) == SPEC


def test_every_client_has_a_noise_of_its_own(address):
    first, second = load_policy(address), load_policy(address)
    first.seed(1), second.seed(1)
    expected = [first.plan(HISTORY) for _ in range(2)]
    np.testing.assert_array_equal(second.plan(HISTORY), expected[0])
    first.plan(HISTORY)
    np.testing.assert_array_equal(second.plan(HISTORY), expected[1])
    first.close(), second.close()


def test_wrong_tokens_are_refused_before_anything_is_read(server, address, tmp_path):
    other = tmp_path / "token"
    other.write_text("another token, as long\n")
    with pytest.raises(HardwareError, match="wrong token"):
        load_policy(f"{server.address}/arm/best?token_file={other}")
    with pytest.raises(ConfigError, match="token file"):
        load_policy(f"{server.address}/arm/best?token_file={tmp_path / 'none'}")
    other.write_text("short")
    with pytest.raises(ConfigError, match="16 or more"):
        PolicyWebServer(tmp_path, ServerConfig(token_file=other))


@pytest.mark.parametrize("path", ["../secret", "..%2Fsecret", "link", "arm", "nothing", "%00", "/etc", "a" * 2000])
def test_paths_outside_the_root_are_refused(server, root, path):
    with pytest.raises(HardwareError, match=r"no policy|no such policy|cannot be reached|refused"):
        load_policy(f"{server.address}/{path}?token_file={root / 'token'}")


def test_a_made_token_is_readable_by_its_owner_only(root, tmp_path):
    server = PolicyWebServer(root, ServerConfig(token_file=tmp_path / "new" / "token"))
    assert (tmp_path / "new" / "token").stat().st_mode & 0o777 == 0o600
    assert len(server._token) >= 32


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95pickle",
        b"\xc1" * 100,
        b"\x91" * 5000,
        "text",
        encode({"type": "plan"}),
        encode({"type": 3, "id": 1}),
        encode({"type": "plan", "id": 1, "history": {"array": "|O", "shape": [1], "data": b"12345678"}}),
        encode({"type": "plan", "id": 1, "history": {"array": "<f4", "shape": [2**40], "data": b"1"}}),
        encode({"type": "plan", "id": 1, "history": {"array": "<f4", "shape": [-1, -1], "data": b"1234"}}),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_garbage_ends_its_own_connection_only(server, policy, data):
    connection = greeted(server)
    connection.send(data)
    assert decode(connection.recv(timeout=PATIENCE))["type"] == "error"
    with pytest.raises(ConnectionClosed):
        connection.recv(timeout=PATIENCE)
    assert policy.plan(HISTORY).shape == (2, 8, 2)


@pytest.mark.parametrize(
    "question",
    [
        {"type": "plan", "history": {}},
        {"type": "plan", "history": {"state": np.ones((2, 3, 3), np.float32)}},
        {"type": "plan", "history": {"state": np.full((1, 2, 3), np.nan, np.float32)}},
        {"type": "plan", "history": {"state": np.ones((1000, 2, 3), np.float32)}},
        {"type": "plan", "history": {"state": np.float32(1).reshape(1)[0] * np.ones(())}},
        {"type": "plan", "history": HISTORY, "noise": np.ones((1, 8, 2), np.float32)},
        {"type": "plan", "history": HISTORY, "noise": np.ones((2, 3), np.float32)},
        {"type": "plan", "history": HISTORY, "commitment": {"way": "guided_full"}},
        {"type": "refine", "history": HISTORY, "actions": np.ones((2, 9), np.float32)},
        {"type": "seed", "seed": "x"},
        {"type": "eval", "code": "import os"},
    ],
    ids=lambda question: question["type"],
)
def test_questions_that_do_not_fit_are_refused_and_the_connection_goes_on(server, question):
    connection = greeted(server)
    connection.send(encode({**question, "id": 5}))
    answer = decode(connection.recv(timeout=PATIENCE))
    assert (answer["type"], answer["id"]) == ("error", 5)
    assert "\n" not in answer["message"]
    connection.send(encode({"type": "plan", "history": HISTORY, "id": 6}))
    assert decode(connection.recv(timeout=PATIENCE))["actions"].shape == (2, 8, 2)
    connection.close()


def test_oversized_messages_and_other_versions_end_the_connection(server, policy):
    connection = greeted(server)
    connection.send(bytes(LARGEST_MESSAGE + 1))
    with pytest.raises(ConnectionClosed, match="1009"):
        connection.recv(timeout=PATIENCE)
    connection = raw(server)
    connection.send(encode({"type": "hello", "protocol": 99}))
    assert "protocol 1" in decode(connection.recv(timeout=PATIENCE))["message"]
    assert policy.plan(HISTORY).shape == (2, 8, 2)


def test_half_open_clients_are_dropped_and_hold_nobody_up(server, policy):
    host, port = server._server.socket.getsockname()[:2]
    silent = [socket.create_connection((host, port)) for _ in range(20)]
    for one in silent[:10]:
        one.sendall(b"GET /arm/best HTTP/1.1\r\nHost: x\r\n")  # and nothing more
    speechless = raw(server)  # opens, and never says hello
    begun = time.monotonic()
    assert policy.plan(HISTORY).shape == (2, 8, 2)
    assert time.monotonic() - begun < 2.0, "before any of them is given up"
    with pytest.raises(ConnectionClosed):
        speechless.recv(timeout=PATIENCE)
    for one in silent:
        one.settimeout(PATIENCE)
        while one.recv(4096):
            pass  # until the server closes it
        one.close()


def vanish(connection):
    """From here on nobody reads what comes, and no ping is answered, while the connection stays open."""
    connection.protocol_mutex.acquire()


def ask_and_never_read(connection):
    """Ask for large plans until the server can send no more."""
    vanish(connection)
    history = {"state": np.ones((256, 2, 3), np.float32)}
    connection.socket.settimeout(0.4)
    for number in range(5000):
        connection.protocol.send_binary(encode({"type": "plan", "history": history, "id": number}))
        try:
            for data in connection.protocol.data_to_send():
                connection.socket.sendall(data)
        except TimeoutError:
            return  # the server reads no more, for it waits for us
    raise AssertionError("the server has room for every reply")


@pytest.mark.parametrize("leave", [vanish, ask_and_never_read])
def test_a_greeted_client_that_is_gone_gives_its_place_back(root, tmp_path, leave):
    config = ServerConfig(port=0, token_file=tmp_path / "token", max_clients=1, ping_seconds=0.7)
    with PolicyWebServer(root, config) as server, socket.socket() as small:
        for one in (server._server.socket, small):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that few replies fill them
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(server._server.socket.getsockname()[:2])
        connection = greeted(server, sock=small)
        with pytest.raises(InvalidStatus, match="503"):
            raw(server)
        leave(connection)
        wait_for_clients(server, 0)
        policy = load_policy(f"{server.address}/arm/best?token_file={tmp_path / 'token'}&timeout={PATIENCE}")
        assert policy.plan(HISTORY).shape == (2, 8, 2)
        policy.close()
        connection.protocol_mutex.release()


def test_a_client_that_is_there_and_asks_nothing_keeps_its_place(root, tmp_path):
    config = ServerConfig(port=0, token_file=tmp_path / "token", ping_seconds=0.2)
    with PolicyWebServer(root, config) as server:
        connection, pings = greeted(server), []
        receive = connection.protocol.receive_data
        connection.protocol.receive_data = lambda data: (pings.append(data), receive(data))
        deadline = time.monotonic() + PATIENCE
        while len(pings) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(server._clients) == 1
        connection.close()


def test_no_more_clients_than_allowed(server, policy):
    others = [greeted(server), greeted(server)]
    with pytest.raises(Exception, match="503"):
        raw(server)
    for one in others:
        one.close()
    wait_for_clients(server, 1)
    greeted(server).close()


def test_a_server_that_does_not_answer_in_time_is_an_error_and_its_late_answer_is_never_used(
    root, tmp_path, monkeypatch
):
    import robot_rl.serving.server as module

    slow, hang = load_policy(root / "arm" / "best"), threading.Event()
    plan = slow.plan
    slow.plan = lambda history, **options: (hang.wait(PATIENCE), np.full((2, 8, 2), 9.0))[1]
    monkeypatch.setattr(module, "load_policy", lambda *arguments: slow)
    token = tmp_path / "token"
    with PolicyWebServer(root, ServerConfig(port=0, token_file=token)) as server:
        policy = load_policy(f"{server.address}/arm/best?token_file={token}&timeout=2")
        begun = time.monotonic()
        with pytest.raises(HardwareError, match=r"did not answer within 2 s"):
            policy.plan(HISTORY)
        assert time.monotonic() - begun < 10.0
        slow.plan = plan
        hang.set()
        assert np.abs(policy.plan(HISTORY)).max() <= 1.0  # over a new connection
        policy.close()


@pytest.mark.timeout(60)
def test_a_server_that_has_stopped_does_not_hold_up_who_sends(tmp_path):
    over = threading.Event()
    described = {"type": "policy", "protocol": 1, "spec": SPEC.to_json(), "obs_steps": 2, "horizon": 8}
    described |= {"execute_steps": 4, "closed_loop": False, "real_time": [], "prefix_steps": 0}

    def stop_reading(connection):
        connection.recv()
        connection.send(encode(described))
        with connection.protocol_mutex:  # without it the connection's own thread takes in nothing more
            over.wait()

    (tmp_path / "token").write_text("x" * 32)
    (tmp_path / "token").chmod(0o600)
    with serve(stop_reading, "127.0.0.1", 0, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        policy = load_policy(f"ws://127.0.0.1:{port}/arm?token_file={tmp_path / 'token'}&timeout=0.2")
        try:
            with pytest.raises(HardwareError, match="is lost"):
                policy.plan({"state": np.zeros((1_000_000, 2, 3), np.float32)})
        finally:
            over.set()


def test_a_server_that_dies_is_an_error_and_is_found_again(root, tmp_path):
    config = ServerConfig(port=0, token_file=tmp_path / "token")
    server = PolicyWebServer(root, config)
    server.start()
    port = server._server.socket.getsockname()[1]
    policy = load_policy(f"{server.address}/arm/best?token_file={tmp_path / 'token'}&timeout={PATIENCE}")
    server.stop()
    for _ in range(2):
        with pytest.raises(HardwareError, match=r"lost|reached"):
            policy.plan(HISTORY)
    with PolicyWebServer(root, ServerConfig(port=port, token_file=tmp_path / "token")):
        assert policy.plan(HISTORY).shape == (2, 8, 2)
        policy.close()


def test_a_policy_that_has_changed_is_refused_on_reconnecting_until_the_first_is_back(root, tmp_path):
    first = load_policy(root / "arm" / "best")
    other = ChunkedPolicy(SPEC, ChunkedConfig(width=16, depth=1, horizon=6, execute_steps=4, sample_steps=2)).eval()
    save_policy(first, tmp_path / "arm")
    token, port = tmp_path / "token", 0
    for served, known in ((first, True), (other, False), (first, True)):
        save_policy(served, tmp_path / "arm")
        with PolicyWebServer(tmp_path, ServerConfig(port=port, token_file=token)) as server:
            if not port:
                port = server._server.socket.getsockname()[1]
                policy = load_policy(f"{server.address}/arm?token_file={token}&timeout={PATIENCE}")
            for _ in range(2):
                if known:
                    assert policy.plan(HISTORY).shape == (2, 8, 2)
                else:
                    with pytest.raises(HardwareError, match="serves another policy than before"):
                        policy.plan(HISTORY)
                    wait_for_clients(server, 0)
        if known:
            with pytest.raises(HardwareError, match="lost"):
                policy.plan(HISTORY)
    policy.close()


@pytest.mark.parametrize("address", ["ws://host", "ws://:80", "ws://host:9?colour=red", "ws://host:9?timeout=soon"])
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(ConfigError, match="address"):
        load_policy(address)


def test_messages_come_back_as_they_were():
    message = {"type": "x", "values": [np.arange(6).reshape(2, 3), np.array([True]), np.float32(2.5)], "none": None}
    found = decode(encode(message))
    np.testing.assert_array_equal(found["values"][0], message["values"][0])
    assert found["values"][1].dtype == bool
    assert found["values"][2] == 2.5
    commitment = Commitment(np.ones((1, 4, 2), np.float32), np.array([3]), 2, RealTimeConfig("guided", "identity"))
    again = unpack_commitment(decode(encode({"type": "x", "c": pack_commitment(commitment)}))["c"], 1, 4, 2)
    np.testing.assert_array_equal(again.weights, commitment.weights)
    with pytest.raises(DataError, match="shape"):
        unpack_commitment(pack_commitment(commitment), 2, 4, 2)


def test_a_runner_goes_on_from_its_chunks_through_a_server(policy):
    runner = PolicyRunner(policy, 5, RealTimeConfig("guided", "identity"))
    for _ in range(10):
        assert runner.step({"state": np.zeros((5, 3), np.float32)}).shape == (5, 2)
    assert runner.commitment.remaining.tolist() == [4] * 5
