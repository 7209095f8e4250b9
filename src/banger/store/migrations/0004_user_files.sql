-- Whether a VM gets the user's files at its starts, and the paths of those that it ever got, or may have (JSON).
ALTER TABLE vms ADD COLUMN credentials INTEGER NOT NULL DEFAULT 1;
ALTER TABLE vms ADD COLUMN synced TEXT NOT NULL DEFAULT '[]';
