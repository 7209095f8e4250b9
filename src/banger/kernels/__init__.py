"""Kernels: an ELF, its modules as one read-only ext4, and what the initramfs loads."""
