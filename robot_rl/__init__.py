"""From demonstrations to a safe robot that improves itself.

Importing this package loads neither torch nor rclpy; the rooms inside do when something needs them.
"""

__version__ = "0.1.0"
