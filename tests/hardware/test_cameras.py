"""Cameras: newest image, honest stamps, frozen and lost ones found; robots that carry them, images that are paired."""

import sys
import threading
import time
import types

import numpy as np
import pytest
from deployment_rig import VirtualClock, WanderingPolicy

from hardware.cameras.base import BaseCamera, CameraConfig, ThreadedCamera
from hardware.cameras.opencv import OpenCVCamera, OpenCVCameraConfig
from hardware.cameras.realsense import RealSenseCamera, RealSenseCameraConfig
from hardware.cameras.rig import MAX_SKEW, RobotWithCameras, build_camera, with_cameras
from hardware.control.executor import Executor, ExecutorConfig
from hardware.policy_process import PolicyServer
from hardware.robots.build import build_robot
from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.safety.flags import flag_names
from hardware.transport import InProcessTransport
from robot_rl.core.camera import Camera
from robot_rl.core.errors import ConfigError, DataError, HardwareError, MissingDependencyError, UnknownNameError
from robot_rl.core.robot_testing import check_robot
from robot_rl.core.teleop import OperatorEvent, OperatorInput


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.002)


class TestCamera(ThreadedCamera):
    """A camera whose images are counted, and whose cable can be pulled."""

    __test__ = False
    reopen_seconds = 0.05

    def __init__(self, config=None):
        super().__init__(config or CameraConfig(width=8, height=6, max_identical=5))
        self.plugged, self.still = True, False
        self.opened = self.count = 0

    def _open(self):
        if not self.plugged:
            raise HardwareError("it is not plugged in")
        self.opened += 1

    def _grab(self):
        time.sleep(0.005)
        if not self.plugged:
            raise HardwareError("the cable was pulled")
        self.count += not self.still
        return np.full((6, 8, 3), self.count % 256, np.uint8)

    def _close(self):
        pass


def test_the_newest_frame_has_the_stamp_of_its_exposure():
    camera = TestCamera(CameraConfig(width=8, height=6, latency=0.05))
    assert isinstance(camera, Camera)
    with pytest.raises(HardwareError, match="not connected"):
        camera.frame()
    camera.connect()
    first = camera.frame()
    wait_until(lambda: camera.frame().seq >= first.seq + 3)
    frame = camera.frame()
    assert 0.05 <= time.monotonic() - frame.stamp < 1.0
    assert frame.stamp > first.stamp
    assert frame.image.shape == camera.spec.shape
    assert (first.image == first.image[0, 0, 0]).all(), "a frame is never written again"
    camera.disconnect()
    camera.disconnect()
    assert "camera" not in " ".join(thread.name for thread in threading.enumerate())


def test_a_lost_camera_keeps_its_stamp_and_is_opened_again(caplog):
    camera = TestCamera()
    camera.connect()
    camera.plugged = False
    wait_until(lambda: camera.failures >= 3)
    lost = camera.frame()
    time.sleep(0.03)
    assert camera.frame() is lost
    assert sum("is lost: the cable was pulled" in record.message for record in caplog.records) == 1, "said once"
    camera.plugged = True
    wait_until(lambda: camera.frame().seq > lost.seq)
    assert camera.opened == 2
    assert "gives images again" in caplog.text
    camera.disconnect()


def test_a_frozen_camera_gives_no_new_frames_however_fresh_their_stamps(caplog):
    camera = TestCamera()
    camera.connect()
    camera.still = True
    wait_until(lambda: "it is frozen" in caplog.text)
    frozen = camera.frame()
    time.sleep(0.05)
    assert camera.frame() is frozen
    camera.still = False
    wait_until(lambda: camera.frame() is not frozen)
    camera.disconnect()


def test_a_camera_that_is_not_there_is_refused_at_once():
    camera = TestCamera()
    camera.plugged = False
    with pytest.raises(HardwareError, match="not plugged in"):
        camera.connect()
    with pytest.raises(HardwareError, match="not connected"):
        camera.frame()
    with pytest.raises(ConfigError, match="no image"):
        TestCamera(CameraConfig(width=0))


@pytest.fixture
def film(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for k in range(10):
        image = np.zeros((48, 64, 3), np.uint8)
        image[..., 0] = 255  # blue, in OpenCV's order
        image[:, : 6 * (k + 1), 1] = 200
        writer.write(image)
    writer.release()
    assert path.stat().st_size > 1000
    return path


def test_a_video_file_is_a_camera(film):
    camera = OpenCVCamera(OpenCVCameraConfig(source=str(film), width=32, height=24, rate_hz=100.0))
    camera.connect()
    begun = time.monotonic()
    wait_until(lambda: camera.frame().seq >= 15)
    assert time.monotonic() - begun > 0.1, "played at its rate, and over again"
    image = camera.frame().image
    assert image.shape == (24, 32, 3)
    assert image[..., 2].mean() > 200 > 100 > image[..., 0].mean(), "RGB"
    camera.disconnect()


def test_opencv_names_the_device_that_does_not_open(tmp_path):
    with pytest.raises(HardwareError, match="'/dev/video99' cannot be opened"):
        OpenCVCamera(OpenCVCameraConfig(source="/dev/video99")).connect()


class FakeRealSense(types.ModuleType):
    """The part of librealsense that the adapter uses."""

    def __init__(self):
        super().__init__("pyrealsense2")
        self.plugged, self.count, self.enabled, self.running = True, 0, [], 0
        self.stream = types.SimpleNamespace(color="color")
        self.format = types.SimpleNamespace(rgb8="rgb8")
        module = self

        class Config:
            def enable_device(self, serial):
                module.enabled.append(serial)

            def enable_stream(self, *wanted):
                module.enabled.append(wanted)

        class Pipeline:
            def start(self, config):
                if not module.plugged:
                    raise RuntimeError("No device connected")
                module.running += 1

            def wait_for_frames(self, milliseconds):
                time.sleep(0.005)
                if not module.plugged:
                    raise RuntimeError("Frame didn't arrive within 5000")
                module.count += 1
                colour = types.SimpleNamespace(get_data=lambda: np.full((48, 64, 3), module.count % 256, np.uint8))
                return types.SimpleNamespace(get_color_frame=lambda: colour)

            def stop(self):
                module.running -= 1

        self.config, self.pipeline = Config, Pipeline


def test_realsense_against_an_object_in_its_place(monkeypatch):
    library = FakeRealSense()
    monkeypatch.setitem(sys.modules, "pyrealsense2", library)
    monkeypatch.setattr(RealSenseCamera, "requires", ())
    monkeypatch.setattr(RealSenseCamera, "reopen_seconds", 0.05)
    camera = RealSenseCamera(RealSenseCameraConfig(width=64, height=48, serial="0123"))
    camera.connect()
    assert library.enabled == ["0123", ("color", 64, 48, "rgb8", 30)]
    wait_until(lambda: camera.frame().seq > 3)
    library.plugged = False
    wait_until(lambda: camera.failures > 1)
    library.plugged = True
    lost = camera.frame().seq
    wait_until(lambda: camera.frame().seq > lost)
    camera.disconnect()
    assert library.running == 0
    library.plugged = False
    with pytest.raises(HardwareError, match="RealSense camera 0123 does not start: No device connected"):
        RealSenseCamera(RealSenseCameraConfig(serial="0123")).connect()


def test_realsense_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr("hardware.cameras.base.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'robot-rl\[realsense\]'"):
        RealSenseCamera(RealSenseCameraConfig()).connect()


def rigged(camera=None):
    return RobotWithCameras(FakeRobot(), {"wrist": camera or TestCamera()})


def test_a_robot_with_a_camera_keeps_the_contract():
    check_robot(rigged)


def test_a_camera_that_fails_leaves_nothing_connected():
    camera = TestCamera()
    camera.plugged = False
    robot = rigged(camera)
    with pytest.raises(HardwareError, match="not plugged in"):
        robot.connect()
    assert robot.state().value == "disconnected"
    with pytest.raises(ConfigError, match=r"has images\.front already"):
        RobotWithCameras(FakeRobot(camera=True), {"front": TestCamera()})


def test_a_lost_camera_brakes_the_robot_under_its_own_name():
    """Real time, real thread: stamps of the camera reach the safety chain through the observation."""
    camera = TestCamera(CameraConfig(width=8, height=6, max_identical=0))
    robot = rigged(camera)
    transport = InProcessTransport(quiet=True)
    policy = WanderingPolicy(robot.spec)
    server = PolicyServer(policy, transport.policy)
    transport.on_observation = server.serve_once
    config = ExecutorConfig(
        execute_steps=4, blend_seconds=0.0, max_camera_age=0.2, max_state_age=2.0, operator_timeout=9
    )
    executor = Executor(robot, transport.executor, config)
    executor.connect()

    def tick(*events):
        transport.send_operator(OperatorInput(time.monotonic(), 0, False, np.zeros(3), events))
        verdict = executor.tick()
        time.sleep(0.01)
        return verdict

    tick(OperatorEvent.ENABLE)
    for _ in range(20):
        tick()
    assert executor.arbiter.mode.value == "auto"
    camera.plugged = False
    lost = time.monotonic()
    while executor.arbiter.mode.value == "auto":
        assert time.monotonic() < lost + 3.0
        verdict = tick()
    assert executor.arbiter.reason == "camera_stale"
    assert "camera_stale" in flag_names(verdict.flags)
    assert time.monotonic() - camera.frame().stamp >= 0.2
    executor.shut_down()


# ---- images that belong together -----------------------------------------------------------------------------------


class TimedCamera(BaseCamera):
    """A camera on a virtual clock: its images arrive late, and show when they were taken, in milliseconds."""

    def __init__(self, clock, rate, delay=0.0):
        super().__init__(CameraConfig(width=2, height=1, latency=delay, max_identical=0), clock=clock)
        self.period, self.delay, self.plugged = 1.0 / rate, delay, True
        self.begun, self.exposed = clock(), -1

    def _start(self):
        self._expose()

    def disconnect(self):
        pass

    def _expose(self):
        self.exposed += 1
        taken = self.begun + self.exposed * self.period
        image = np.frombuffer(np.array([taken * 1e3, 0, 0]).astype("<u2").tobytes(), np.uint8).reshape(1, 2, 3)
        self._take(image, taken + self.delay)

    def run(self):
        """Let everything arrive that has by now."""
        while self.plugged and self.begun + (self.exposed + 1) * self.period + self.delay <= self._now():
            self._expose()


def shown(image):
    """When an image of a `TimedCamera` was taken, in seconds."""
    return float(np.frombuffer(image.tobytes(), "<u2")[0]) / 1e3


class Timed:
    """A robot on a virtual clock with cameras of given rates (Hz) and delays (s), by name."""

    def __init__(self, lag=0.0, max_skew=MAX_SKEW, **cameras):
        self.clock = VirtualClock()
        self.clock.now = 10.0
        self.cameras = {name: TimedCamera(self.clock, *one) for name, one in cameras.items()}
        robot = FaultyRobot(FakeRobot(clock=self.clock))
        robot.faults.delay_seconds = lag
        self.robot = RobotWithCameras(robot, self.cameras, max_skew)
        self.robot.connect()

    def observe(self, seconds):
        """Observe at 100 Hz for a time."""
        for _ in range(round(100 * seconds)):
            self.clock.now += 0.01
            for camera in self.cameras.values():
                camera.run()
            yield self.robot.observe()


def test_images_of_cameras_of_different_rates_are_taken_near_to_one_time():
    rig = Timed(fast=(30.0,), slow=(10.0, 0.02), late=(25.0, 0.07))
    list(rig.observe(0.3))
    apart = []
    for seen in rig.observe(2.0):
        newest = {name: camera.frame().stamp for name, camera in rig.cameras.items()}
        common = min(newest.values())
        for name, camera in rig.cameras.items():
            stamp = seen.stamps[f"images.{name}"]
            assert abs(stamp - common) <= camera.period / 2 + 1e-9, "the nearest that this camera took"
            assert shown(seen.values[f"images.{name}"]) == pytest.approx(stamp, abs=2e-3), "the stamp of this image"
        assert rig.robot.skew == max(seen.stamps.values()) - min(seen.stamps.values())
        assert rig.clock.now - common <= 0.1 + 0.02 + 0.01, "no older than the slowest camera's newest image"
        apart.append(max(newest.values()) - common)
    assert max(apart) > 0.05, "the newest images did not belong together"


def test_images_belong_to_a_measurement_that_is_older_than_they_are():
    rig = Timed(lag=0.09, front=(50.0,))
    list(rig.observe(0.3))
    for seen in rig.observe(0.5):
        assert rig.clock.now - seen.stamp >= 0.09
        assert abs(seen.stamps["images.front"] - seen.stamp) <= 0.01 + 1e-9


def test_a_camera_that_is_lost_is_named_and_does_not_hold_up_the_others(caplog):
    rig = Timed(front=(30.0,), wrist=(30.0, 0.01))
    list(rig.observe(0.5))
    rig.cameras["wrist"].plugged = False
    lost = rig.cameras["wrist"].frame().stamp
    before = -np.inf
    for seen in rig.observe(2.0):
        assert seen.stamps["images.wrist"] == lost, "its age is what it is"
        age = seen.age(rig.clock.now, "images.front")
        assert before <= seen.stamps["images.front"]
        assert age <= MAX_SKEW + 0.06, "and that of the other stays below what brakes the robot"
        before = seen.stamps["images.front"]
        if rig.clock.now > lost + MAX_SKEW + 0.05:
            assert age <= 0.04
            assert rig.robot.skew > MAX_SKEW
    assert seen.age(rig.clock.now, "images.wrist") > 1.9
    named = [record.message for record in caplog.records if "do not show the same time" in record.message]
    assert len(named) == 1
    assert "images.wrist is 0.2" in named[0]
    assert "older than images.front" in named[0]
    rig.cameras["wrist"].plugged = True
    seen = list(rig.observe(0.2))[-1]
    assert rig.robot.skew <= 0.02
    assert seen.age(rig.clock.now, "images.wrist") < 0.1


def test_a_camera_keeps_few_images_and_the_last_but_one_in_any_case():
    rig = Timed(fast=(100.0,), slow=(1.0,))
    for _ in rig.observe(3.0):
        pass
    fast, slow = rig.cameras.values()
    kept = fast.config.history
    assert kept - 0.02 <= fast.frame().stamp - fast.near(0.0).stamp <= kept + 1e-9
    assert slow.frame().stamp - slow.near(0.0).stamp == pytest.approx(1.0)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_cameras_and_robots_are_made_from_a_file(tmp_path, film):
    path = tmp_path / "robot.yaml"
    path.write_text(
        f"size: 2\ncameras:\n  top: {{kind: opencv, source: {film}, width: 32, height: 24}}\n  side: {{kind: ros}}\n"
        "  max_skew: 0.05\n"
    )
    robot = build_robot("fake", {"rate_hz": 10.0}, path)
    assert robot.spec.observation["images.top"].shape == (24, 32, 3)
    assert set(robot.spec.observation) == {"state", "images.top", "images.side"}
    assert robot.spec.rate_hz == 10.0
    assert robot.spec.action.size == 2
    assert robot.max_skew == 0.05
    for settings, error, message in (
        ({"kind": "opencv", "widht": 3}, UnknownNameError, "Did you mean 'width'"),
        ({"kind": "opencv", "width": "wide"}, ConfigError, "setting 'width' of camera 'a' is 'wide', expected int"),
        ({"kind": "open_cv"}, UnknownNameError, "Unknown camera 'open_cv'"),
        ({"width": 3}, ConfigError, "needs a 'kind'"),
        ({"kind": "ros", "clock": "sundial"}, ConfigError, "sundial"),
    ):
        with pytest.raises(error, match=message):
            build_camera("a", settings)
    for skew in ("much", 0.0):
        with pytest.raises(ConfigError, match="max_skew"):
            with_cameras(FakeRobot(), {"max_skew": skew})
    with pytest.raises(ConfigError, match="expected a mapping"):
        with_cameras(FakeRobot(), ["front"])
    with pytest.raises(UnknownNameError, match="Did you mean 'port'"):
        build_robot("so101", {"prot": "/dev/ttyUSB0"})
    path.write_text("- a\n")
    with pytest.raises(DataError, match="no mapping"):
        build_robot("fake", {}, path)
