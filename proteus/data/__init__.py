"""Images, and which of them, cropped and masked how, stand at a position of a run."""
