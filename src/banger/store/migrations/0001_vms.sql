CREATE TABLE vms (
    id              TEXT PRIMARY KEY,
    name            TEXT NOT NULL UNIQUE,
    state           TEXT NOT NULL CHECK (
        state IN ('creating', 'stopped', 'starting', 'running', 'stopping', 'deleting')
    ),
    state_reason    TEXT NOT NULL DEFAULT '',
    image           TEXT NOT NULL,
    kernel          TEXT NOT NULL,
    vcpu            INTEGER NOT NULL,
    memory_bytes    INTEGER NOT NULL,
    disk_size_bytes INTEGER NOT NULL,
    vmm             TEXT NOT NULL,           -- as asked for: auto, qemu
    network         TEXT NOT NULL,
    machine_id      TEXT NOT NULL,
    mac             TEXT NOT NULL,
    created_at      TEXT NOT NULL,
    -- the owner of an ephemeral VM (`--rm`): gone owner, deleted VM
    owner_pid       INTEGER,
    owner_start     INTEGER,                 -- /proc/PID/stat field 22, clock ticks since boot
    -- the VMM process; set while starting, running or stopping
    running_vmm     TEXT,
    accel           TEXT,
    accel_reason    TEXT NOT NULL DEFAULT '',
    boot_id         TEXT,
    pid             INTEGER,
    pid_start       INTEGER,
    started_at      TEXT
) STRICT;
