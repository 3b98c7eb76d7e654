"""The paper's comparisons in one process, without Ray: `mentor-serve compare`, docs/results.md."""
