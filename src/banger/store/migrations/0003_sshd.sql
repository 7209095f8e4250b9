-- Whether the agent sees to an sshd in the background of each boot.
ALTER TABLE vms ADD COLUMN with_sshd INTEGER NOT NULL DEFAULT 0;
