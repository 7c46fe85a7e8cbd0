"""Where the metrics of a run go beside metrics.jsonl: TensorBoard, and experiment trackers as plugins."""
