"""Images from the ray tracer: right size, right things in the right place, per lane."""

import os
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

from robot_rl.core.errors import ConfigError
from sim.render import Renderer
from sim.tasks import tee
from sim.tasks.push_t import make

MESH = """
<mujoco>
  <asset><mesh name="wedge" vertex="-1 -1 0  1 -1 0  1 1 0  -1 1 0  0 0 1" scale="0.1 0.1 0.1"/></asset>
  <worldbody>
    <camera name="above" pos="0 0 1" fovy="45"/>
    <geom type="mesh" mesh="wedge" rgba="1 0 0 1"/>
    <geom type="sphere" size="0.05" pos="0.25 0.25 0" rgba="0 0 1 1"/>
  </worldbody>
</mujoco>
"""


def test_push_t_shows_block_pusher_and_goal_where_they_are():
    env = make(2, threads=1)
    state = env.reset(1)["state"]
    frames = [env.render(lane) for lane in range(2)]
    for lane, frame in enumerate(frames):
        assert frame.shape == (256, 256, 3)
        assert frame.dtype == np.uint8
        pusher = frame[tuple((state[lane, 1::-1] / 2).astype(int))].astype(int)
        assert pusher[2] > pusher[0] + 50, "no blue pusher where agent_pos says"
        bar = tee.keypoints(state[lane : lane + 1, 2:].astype(float))[0, :4].mean(axis=0)
        block = frame[tuple((bar[::-1] / 2).astype(int))].astype(int)
        assert block.max() < 200, "no grey block where state says"
        assert abs(block - block.mean()).max() < 40
    assert (frames[0] != frames[1]).any()
    goal = frames[0].astype(int)
    assert ((goal[..., 1] - goal[..., 0]) > 50).sum() > 200


def test_meshes_and_primitives():
    model = mujoco.MjModel.from_xml_string(MESH)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    image = Renderer(model, 64, 48, "above").render_data(data).astype(int)
    assert image.shape == (48, 64, 3)
    assert image[24, 32, 0] > image[24, 32, 2] + 40
    blue = np.argwhere(image[..., 2] > image[..., 0] + 40)
    assert len(blue)
    assert blue[:, 0].mean() < 24
    assert blue[:, 1].mean() > 32


def test_unknown_cameras_are_named():
    model = mujoco.MjModel.from_xml_string(MESH)
    with pytest.raises(ConfigError, match=r"no camera 'front'\. Available: above"):
        Renderer(model, camera="front")
    with pytest.raises(ConfigError, match="has no camera"):
        Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"))


LOADED = """
import sys
import mujoco
from sim.render import Renderer
model = mujoco.MjModel.from_xml_string(sys.argv[1])
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
assert Renderer(model, 64, 48, "above").render_data(data).std() > 1
print(open("/proc/self/maps").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
def test_rendering_needs_no_display_and_loads_no_gl_library():
    bare = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    found = subprocess.run(
        [sys.executable, "-c", LOADED, MESH],
        cwd=Path(__file__).parents[2],
        env=bare,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    names = {Path(line.split()[-1]).name for line in found.stdout.splitlines() if ".so" in line}
    assert any(name.startswith("libmujoco") for name in names), "what is loaded can be seen"
    assert any(name.startswith("warp") for name in names)
    # MuJoCo itself imports GLFW, which opens one of these only to draw.
    assert not [name for name in names if name.startswith(("libGL", "libEGL", "libOSMesa", "libOpenGL", "libvulkan"))]
