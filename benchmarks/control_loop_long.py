"""Ten minutes of the executor beside inference by ONNX and three cameras' images, at 100 and at 500 Hz.

It is `benchmarks.control_loop` with the kinds ``cameras`` and ``fast_cameras``; that module says what they are. Further
options are passed on: ``--kinds cameras fast_cameras cameras_normal`` adds ten minutes without real-time priority.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.control_loop import main

LONG = ["--seconds", "600", "--rounds", "1", "--kinds", "cameras", "fast_cameras", "--name", "control_loop_long"]

if __name__ == "__main__":
    main([*LONG, *sys.argv[1:]])
