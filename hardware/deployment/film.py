"""Films of a simulated deployment: the commands of every tick are kept while it runs, then replayed and rendered.

Nothing is rendered while the control loop runs. Physics is deterministic, so the same scene and the same commands give
the same motion; each frame is bordered in the colour of the mode it was in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hardware.control.arbiter import Mode
from hardware.recording.recorder import MODE_CODES
from hardware.robots.sim import SimRobot

COLOURS = {
    Mode.AUTO: (15, 138, 109),
    Mode.ALIGN: (15, 138, 109),
    Mode.HUMAN: (209, 138, 19),
    Mode.STOPPED: (194, 59, 49),
    Mode.HOLD: (138, 148, 163),
    Mode.IDLE: (138, 148, 163),
}
"""Border by mode, RGB."""
BORDER = 6
"""Width of the border in pixels."""


def film(trace: Path, video: Path, recording: Path | None = None, frame_rate: float = 12.5) -> Path:
    """Replay ``trace`` and write it as H.264 video.

    Args:
        trace: what a `SimRobot` with ``trace`` has left.
        video: the ``.mp4`` file to write.
        recording: data set of the same run, which says when which mode was on.
        frame_rate: frames per second of real time.

    Raises:
        DataError: the trace or the recording cannot be read.
    """
    from robot_rl.data.video import VideoWriter

    robot, stamps, commands = SimRobot.from_trace(trace)
    modes = _modes(recording, stamps)
    every = max(1, round(robot.tick_rate_hz / frame_rate))
    writer = None
    try:
        robot.connect()
        for tick, _ in enumerate(robot.replay(commands)):
            if tick % every:
                continue
            image = _bordered(robot.render(), modes[tick])
            if writer is None:
                writer = VideoWriter(video, robot.tick_rate_hz / every, *image.shape[:2], keyframe_interval=50)
            writer.add(image)
    finally:
        robot.disconnect()
        if writer is not None:
            writer.close()
    return video


def _modes(recording: Path | None, stamps: np.ndarray) -> list[Mode | None]:
    """Return the mode at each stamp (T,): that of the newest recorded step; None where nothing was recorded."""
    if recording is None or not len(stamps):
        return [None] * len(stamps)
    from robot_rl.data.dataset import open_dataset

    extras = open_dataset(recording).load(keys=()).extras
    times, codes = extras["stamp"].ravel(), extras["mode"].ravel()
    newest = np.searchsorted(times, stamps, side="right") - 1
    by_code = {code: mode for mode, code in MODE_CODES.items()}
    return [by_code[int(codes[k])] if k >= 0 else None for k in newest]


def _bordered(image: np.ndarray, mode: Mode | None) -> np.ndarray:
    """Return ``image`` (H, W, 3) uint8 of even size with the mode's border."""
    image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2].copy()
    if mode is not None:
        image[:BORDER] = image[-BORDER:] = COLOURS[mode]
        image[:, :BORDER] = image[:, -BORDER:] = COLOURS[mode]
    return image
