"""Speed and memory, each as a ratio to a baseline that runs beside ours: `baselines` says what we compare with."""
