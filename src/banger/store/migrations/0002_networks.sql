-- How a VM is joined to the world, and the uid its VMM is confined to.
ALTER TABLE vms ADD COLUMN nat INTEGER NOT NULL DEFAULT 1;       -- on the bridge: reaches the outside
ALTER TABLE vms ADD COLUMN isolated INTEGER NOT NULL DEFAULT 1;  -- on the bridge: apart from other VMs
ALTER TABLE vms ADD COLUMN publish TEXT NOT NULL DEFAULT '';     -- HOST:PORT:GUEST_PORT, spaces between
ALTER TABLE vms ADD COLUMN address TEXT;                         -- its lease on the bridge
ALTER TABLE vms ADD COLUMN tap TEXT;                             -- while it runs on the bridge
ALTER TABLE vms ADD COLUMN jail_uid INTEGER;                     -- its VMM's uid and gid under root
CREATE UNIQUE INDEX vms_address ON vms (address) WHERE address IS NOT NULL;
CREATE UNIQUE INDEX vms_jail_uid ON vms (jail_uid) WHERE jail_uid IS NOT NULL;
