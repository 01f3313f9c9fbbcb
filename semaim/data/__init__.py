"""Images, labels and annotations: reading them, checking them, and the built-in scenes."""
