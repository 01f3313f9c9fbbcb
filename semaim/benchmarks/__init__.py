"""Speed and memory, each as a ratio to a baseline that runs alternately with ours; see `baselines`."""
