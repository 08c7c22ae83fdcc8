"""ROS 2 adapter: standard messages, links between processes, node processes. Imports rclpy only when used."""
