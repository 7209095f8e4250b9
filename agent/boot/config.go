// Package boot is /init: from the initramfs to the image's own init, with the agent beside it.
package boot

import (
	"encoding/json"
	"fmt"
	"os"
	"path"
	"strings"
)

// Config is /banger/boot.json. All of it is decided by the host.
type Config struct {
	Hostname    string      `json:"hostname"`
	Drives      Drives      `json:"drives"`
	Files       []File      `json:"files"`
	Directories []Directory `json:"directories"`
	Network     *Network    `json:"network"`
	TimeUnixNs  int64       `json:"time_unix_ns"`
	Init        []string    `json:"init"`
	// Environment is what the image says a process gets: under what an exec asks for.
	Environment map[string]string `json:"environment"`
	Once        *Once             `json:"once"`
	// Export is there when the machine is not to be used but read.
	Export *Export `json:"export"`
}

// Export says what the root file system is freed of before the host reads it; Files are written after that. Nothing
// of it reaches the disks.
type Export struct {
	// Remove holds names of files and, in their last component, patterns of path.Match. Only plain files go.
	Remove []string `json:"remove"`
	// Empty holds names of directories, of which everything in them goes.
	Empty []string `json:"empty"`
	// DropLines holds lines to leave out of a file; what is beside them stays.
	DropLines []Lines `json:"drop_lines"`
}

// Lines are whole lines of the file at Path.
type Lines struct {
	Path    string `json:"path"`
	Content []byte `json:"content_b64"`
}

// Once is a shell script that runs once per boot, behind everything else: nobody waits for it, and its failure is
// a line in its log.
type Once struct {
	Script []byte `json:"script_b64"`
	Log    string `json:"log"`
}

// Duties is what /init tells the long-lived agent, over its standard input.
type Duties struct {
	Network     *Network          `json:"network"` // one that was not there during boot
	Environment map[string]string `json:"environment"`
	Once        *Once             `json:"once"`
}

// Drives says which disk is which: a device path, or `serial:<serial>`, which no probe order changes.
type Drives struct {
	Base    string  `json:"base"`
	Own     string  `json:"own"`
	Modules *string `json:"modules"`
}

// File is written inside the new root in place of what is there.
type File struct {
	Path    string `json:"path"`
	Mode    uint32 `json:"mode"`
	UID     int    `json:"uid"`
	GID     int    `json:"gid"`
	Content []byte `json:"content_b64"`
	// KeepLines adds the lines of Content that a file there lacks, and leaves the others alone: what a user
	// wrote into /etc/hosts or authorized_keys outlives a restart.
	KeepLines bool `json:"keep_lines"`
}

// Directory is made inside the new root, or given this mode and owner.
type Directory struct {
	Path string `json:"path"`
	Mode uint32 `json:"mode"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
}

// Network is the static IPv4 configuration of one interface.
type Network struct {
	Interface   string   `json:"interface"`
	AddressCIDR string   `json:"address_cidr"`
	Gateway     string   `json:"gateway"`
	DNS         []string `json:"dns"` // resolv.conf is among Files: this is for the record
}

// ParseConfig checks boot.json.
func ParseConfig(raw []byte) (*Config, error) {
	config := &Config{}
	if err := json.Unmarshal(raw, config); err != nil {
		return nil, err
	}
	if config.Drives.Base == "" {
		config.Drives.Base = "/dev/vda"
	}
	if config.Drives.Own == "" {
		config.Drives.Own = "/dev/vdb"
	}
	for i := range config.Files {
		if err := checkPath(config.Files[i].Path); err != nil {
			return nil, err
		}
		if config.Files[i].Mode == 0 {
			config.Files[i].Mode = 0o644
		}
	}
	for i := range config.Directories {
		if err := checkPath(config.Directories[i].Path); err != nil {
			return nil, err
		}
		if config.Directories[i].Mode == 0 {
			config.Directories[i].Mode = 0o755
		}
	}
	if config.Once != nil {
		if err := checkPath(config.Once.Log); err != nil {
			return nil, err
		}
	}
	if config.Export != nil {
		if err := config.Export.check(); err != nil {
			return nil, err
		}
	}
	if config.Network != nil {
		if _, _, err := parseAddress(config.Network.AddressCIDR); err != nil {
			return nil, err
		}
	}
	return config, nil
}

func (e *Export) check() error {
	for _, name := range e.Empty {
		if err := checkPath(name); err != nil {
			return err
		}
	}
	for _, name := range e.Remove {
		if err := checkPath(name); err != nil {
			return err
		}
		if _, err := path.Match(path.Base(name), ""); err != nil {
			return fmt.Errorf("pattern %q: %w", name, err)
		}
	}
	for i := range e.DropLines {
		if err := checkPath(e.DropLines[i].Path); err != nil {
			return err
		}
	}
	return nil
}

func checkPath(name string) error {
	if !strings.HasPrefix(name, "/") || path.Clean(name) != name || name == "/" {
		return fmt.Errorf("path %q is not absolute and clean", name)
	}
	return nil
}

func readConfig() (*Config, error) {
	raw, err := os.ReadFile("/banger/boot.json")
	if err != nil {
		return nil, err
	}
	return ParseConfig(raw)
}
