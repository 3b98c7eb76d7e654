"""What the commands of `mentor-serve` compute; the command line only prints it."""
