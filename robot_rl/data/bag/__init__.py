"""Robot recordings as rosbag2 directories: MCAP written and rescued, MCAP and sqlite3 read, and made into data sets."""
