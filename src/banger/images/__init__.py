"""Images: a base root file system as one read-only ext4."""
